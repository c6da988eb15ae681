"""Meta-steps as CUDA graphs: recorded once for their shapes, replayed on new data.

A replay is one launch from the host, however many kernels the step has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.executors.fused import cuda
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned
from fastmeta.precision import of_products
from fastmeta.tasks import Examples
from fastmeta.warning import warn

_KEPT = 8
"""Recordings of a model: each holds the memory of a step."""


class Captured:
    """Computes what was planned by a graph where that can be, and as it stands where not."""

    def __init__(self) -> None:
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._warned = False

    def compute(self, planned: Planned) -> Outcome:
        """As `planner.compute`; **warns**, once, where no graph can be recorded."""
        device, offer = planned.problem.task_weights.device, planned.selected.offer
        if offer.unrecordable:
            self._warn(f"{offer.executor} can't be recorded: {offer.unrecordable}")
            return planner.compute(planned)
        with cuda.guard(device):
            if cuda.capturing(device):
                return planner.compute(planned)  # the caller records already
            recording = self._recording(planned)
            return planner.compute(planned) if recording is None else recording.replay(planned)

    def _recording(self, planned: Planned) -> _Recording | None:
        key = _key(planned)
        if key not in self._recordings:
            while len(self._recordings) >= _KEPT:
                self._recordings.popitem(last=False)
            self._recordings[key] = None
            try:
                self._recordings[key] = _Recording(planned)
            except RuntimeError as error:
                self._warn(str(error).splitlines()[0])
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warn(f"capture: steps run without a CUDA graph: {why}")

    # A copy of a model records anew: graphs know addresses.
    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()


class _Recording:
    """A step on data of its own, and the graph that repeats it."""

    def __init__(self, planned: Planned) -> None:
        # The key names it by its identity, which nothing else may take meanwhile.
        self._of = planned
        self._inputs = [x.detach().clone() for x in _inputs(planned.problem)]
        self._outcome, self._replay = record(
            replace(planned, problem=_on(planned.problem, self._inputs))
        )

    def replay(self, planned: Planned) -> Outcome:
        torch._foreach_copy_(self._inputs, [x.detach() for x in _inputs(planned.problem)])
        self._replay()
        return _copied(self._outcome)


def record(planned: Planned) -> tuple[Outcome, Callable[[], None]]:
    """A step's outcome, and what writes it anew."""
    device = planned.problem.task_weights.device
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        planner.compute(planned)  # what libraries make at a first call, they make here
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outcome = planner.compute(planned)
    return outcome, graph.replay


def _key(planned: Planned) -> Hashable:
    """All that a graph has taken for constant: sizes, options, addresses, stream and precision."""
    problem, inner = planned.problem, planned.problem.inner
    rates = inner.rates.values()
    tensors = [*problem.model.all_parameters().values(), *problem.model.module.buffers()]
    tensors += [rate for rate in rates if isinstance(rate, Tensor)]
    return (
        planned.selected, inner.signature, tuple(r for r in rates if isinstance(r, float)),
        tuple((id(t), t.data_ptr()) for t in tensors), cuda.stream(problem.task_weights.device),
        of_products(problem.task_weights.dtype),
    )  # fmt: skip


def _inputs(problem: Problem) -> list[Tensor]:
    sets = problem.tasks.sets()
    weights = [examples.weights for examples in sets if examples.weights is not None]
    return [
        *(leaf for examples in sets for leaf in examples.leaves()),
        *weights,
        problem.task_weights,
    ]


def _on(problem: Problem, inputs: list[Tensor]) -> Problem:
    """The same problem on other tensors, in the order of `_inputs`."""
    sets = problem.tasks.sets()
    weights = iter(inputs[2 * len(sets) : -1])

    def examples(at: int, like: Examples) -> Examples:
        x, y = inputs[2 * at : 2 * at + 2]
        return replace(
            like, inputs=x, targets=y, weights=None if like.weights is None else next(weights)
        )

    made = [examples(at, like) for at, like in enumerate(sets)]
    tasks = replace(problem.tasks, support=made[0], query=made[1] if len(made) > 1 else None)
    return replace(problem, tasks=tasks, task_weights=inputs[-1])


def _copied(outcome: Outcome) -> Outcome:
    """For the caller to keep: the next replay writes over the recorded tensors."""
    leaves = [leaf for leaf, gradient in outcome.gradients if gradient is not None]
    found = [gradient for _, gradient in outcome.gradients if gradient is not None]
    kept = [outcome.step_losses, outcome.support_losses, outcome.query_outputs, *found]
    losses, support_losses, outputs, *gradients = torch._foreach_mul(kept, 1)  # one launch
    return Outcome(losses, support_losses, outputs, list(zip(leaves, gradients, strict=True)))
