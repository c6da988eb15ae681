"""The three forms of the general path: each runs the module itself.

`vmap` maps `grad(grad)` over chunks of tasks; `loop` runs autograd's double backward task by task;
`sweep` goes backward through the inner loop with Hessian-vector products, at memory flat in K.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.executors.base import Executor, NotSupported, Offer, Unsupported
from fastmeta.executors.generic import cost, loop, sweep, vmap
from fastmeta.executors.generic.features import Body, NotKept, worth_keeping
from fastmeta.executors.generic.linearized import linearized
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.random_state import generators, set_generators
from fastmeta.network.reading import Reading

Run = Callable[[Problem, Body | None], Outcome]


class Form(Executor):
    """A form of the general path."""

    family = "generic"
    timeable = True
    differentiates_again = False
    """Whether the reverse pass runs the model once more, also where each step was run once."""

    def takes(self, device: torch.device) -> bool:
        return True

    def _offer(
        self, problem: Problem, seconds: float, task_bytes: int, description: str, run: Run,
        at_a_time: int = 1,
    ) -> Offer:  # fmt: skip
        return Offer(
            executor="generic",
            form=self.name,
            seconds=seconds,
            workspace_bytes=at_a_time * task_bytes,
            description=description,
            run=partial(_run, run),
            at_a_time=at_a_time,
            timeable=self.timeable,
            may_keep_features=worth_keeping(problem, self.differentiates_again),
            unrecordable="it runs the module itself",
        )


class Loop(Form):
    """Task by task, on autograd's tape: plain PyTorch, and right by construction."""

    name = "loop"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        profile = reading.profile
        seconds, task_bytes = cost.loop(profile, problem), cost.task_bytes(profile, problem)
        offer = self._offer(problem, seconds, task_bytes, "task by task", loop.run)
        return replace(offer, last_resort=problem.low_memory)  # it keeps the graph of all steps

    def linearize(
        self, reading: Reading, problem: Problem, parameters: Tensors
    ) -> Linearized | Unsupported:
        with _context(problem):
            return linearized(problem, parameters)


class Vmap(Form):
    """Chunks of tasks at once."""

    name = "vmap"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        profile, tasks = reading.profile, problem.tasks.rounded
        if problem.low_memory:
            raise NotSupported("memory='low' asks for memory flat in K")
        if tasks == 1:
            raise NotSupported("there is one task, so nothing to map over")
        chunk = cost.chunk_size(profile, problem)

        def run(given: Problem, body: Body | None) -> Outcome:
            if body is not None and given.draws_random:
                raise NotKept("a forward pass draws random numbers")
            return vmap.run(given, chunk, body)

        return self._offer(
            problem,
            cost.vmap(profile, problem) / 0.9,  # where they are close the loop needs less memory
            cost.task_bytes(profile, problem),
            f"{chunk} tasks at a time",
            _without_zeros(run, profile.unreached),
            chunk,
        )


class Sweep(Form):
    """Task by task, each inner step's graph built and freed on its own."""

    name = "sweep"
    timeable = False  # it is slower than the loop, for memory that may not have been asked for
    differentiates_again = True

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        profile = reading.profile
        return self._offer(
            problem,
            1.3 * cost.loop(profile, problem),
            profile.bytes_written * 4 * problem.tasks.support.count
            + profile.parameter_bytes * (problem.inner.steps + 2),
            "task by task, memory flat in K",
            _without_zeros(sweep.run, profile.unreached),
        )


def _run(run: Run, problem: Problem) -> Outcome:
    """Compute a step; layers in front of what adapts run once where that has been verified.

    **Raises** `FormUnavailable` where the form can't compute the problem, and `NotKept` where
    features must be kept and can't be.
    """
    if not problem.keeps_features:
        return _in_context(run, problem, None)
    if problem.must_keep_features:
        return _in_context(run, problem, Body(problem))
    device = problem.task_weights.device
    drawn = generators(device)
    try:
        return _in_context(run, problem, Body(problem))
    except RuntimeError:
        # On other data than it was verified on; an error of the model's own comes again.
        set_generators(drawn, device)
    return _in_context(run, problem, None)


def _in_context(run: Run, problem: Problem, body: Body | None) -> Outcome:
    with _context(problem):
        return run(problem, body)


@contextmanager
def _context(problem: Problem) -> Generator[None, None, None]:
    """The setting in which a module can be differentiated twice."""
    with ExitStack() as context:
        if problem.has_attention:
            # The fused attentions have no second derivative.
            context.enter_context(sdpa_kernel(SDPBackend.MATH))
        device = problem.task_weights.device.type
        if torch.is_autocast_enabled(device):
            # Autocast's cache of cast weights would tie one inner step's graph to the next.
            context.enter_context(
                torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
            )
        yield


def _without_zeros(run: Run, unreached: frozenset[str]) -> Run:
    """The same with None in place of zeros where autograd gives none: optimizers tell."""
    if not unreached:
        return run

    def run_without(problem: Problem, body: Body | None) -> Outcome:
        outcome = run(problem, body)
        names = {id(p): name for name, p in problem.model.parameters().items()}

        def is_none(leaf: Tensor, gradient: Tensor | None) -> bool:
            return names.get(id(leaf)) in unreached and (gradient is None or not gradient.any())

        outcome.gradients = [
            (leaf, None if is_none(leaf, gradient) else gradient)
            for leaf, gradient in outcome.gradients
        ]
        return outcome

    return run_without
