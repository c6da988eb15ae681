"""`adapt`: the inner loop alone, for testing and deployment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from fastmeta.arguments import (
    PlannedStep,
    outside_inference,
    plain_module,
    plan_step,
    refuse_cached,
)
from fastmeta.inner import InnerOptimizer
from fastmeta.network.stateless import StatelessModel, private
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.plan.snapshot import Snapshot
from fastmeta.task_arguments import check_inputs
from fastmeta.tasks import Tree, stacked, unstack


class AdaptedTasks:
    """T adapted copies of one model: a batched function, and a sequence of modules.

    `tasks(x)` evaluates `x [T, Q, ...]`, each task by its own parameters (a list with one
    `[Q, ...]` a task gives a list); `tasks[i]` is task `i` as an ordinary module of its own;
    `len(tasks)` is T. What the tasks share is kept as it was when they were adapted.
    """

    def __init__(
        self,
        model: StatelessModel,
        parameters: dict[str, Tensor],
        support_losses: Tensor,
        batched: bool,
    ) -> None:
        self._model = model
        self._batched = batched
        module = model.module
        self._shared = {
            name: tensor.detach().clone()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if name not in parameters
        }
        self.parameters = parameters
        """The adapted parameters by name, each `[T, ...]`, detached."""
        self.support_losses = support_losses
        """[K, T]: the support loss before each inner step."""

    def __len__(self) -> int:
        return self.support_losses.shape[1]

    def __getitem__(self, index: int) -> nn.Module:
        if not -len(self) <= index < len(self):
            raise IndexError(f"task {index}: there are {len(self)} adapted tasks")
        module = copy.deepcopy(self._model.module)
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        with torch.no_grad():
            for name, value in self._of(index).items():
                named[name].copy_(value)
        return module

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))

    def __call__(self, x: Tree) -> Tree:
        """Predictions `[T, Q, ...]` for inputs `[T, Q, ...]`.

        **Raises** `ValueError` where `x` has another number of tasks.
        """
        if isinstance(x, list) and len(x) != len(self):
            raise ValueError(f"x: {len(x)} tasks, but {len(self)} were adapted")
        if not isinstance(x, list):
            check_inputs("x", x, len(self))
        refuse_cached(self._model.module)
        with planner.stepping(self._model.module):
            if isinstance(x, list):
                return self._one_by_one(x)
            if self._batched:
                try:
                    return self._all_at_once(x)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # what vmap can't map; any other error comes again below
                    pass
            outputs = stacked(self._one_by_one(unstack(x, len(self))))
            self._batched = False
        return outputs

    def _one_by_one(self, each: list[Tree]) -> list[Tree]:
        return [self._evaluate(self._of(i), inputs) for i, inputs in enumerate(each)]

    def _all_at_once(self, x: Tree) -> Tree:
        size = len(self)
        shared = self._private()
        # A buffer that a pass writes has to be one of each task's own under vmap.
        scratch = {
            name: shared[name].expand(size, *shared[name].shape) for name in self._model.written
        }

        def evaluate(parameters: dict[str, Tensor], inputs: Tree, own: dict[str, Tensor]) -> Tree:
            return self._evaluate({**shared, **parameters, **own}, inputs)

        function = vmap(evaluate, in_dims=(0, 0, 0), randomness="different")
        return function(self.parameters, x, scratch)

    def _evaluate(self, tensors: dict[str, Tensor], inputs: Tree) -> Tree:
        written = {name: tensors[name] for name in self._model.written}
        return self._model(tensors, inputs, written)

    def _of(self, task: int) -> dict[str, Tensor]:
        """All of one task's parameters and buffers."""
        return {**self._private(), **{name: value[task] for name, value in self.parameters.items()}}

    def _private(self) -> dict[str, Tensor]:
        """The tensors that the tasks share, for a pass that may write them."""
        return {name: private(tensor) for name, tensor in self._shared.items()}


def adapt(
    model: nn.Module,
    support: Any,
    *,
    inner_lr: Rates = 0.01,
    inner_steps: int = 1,
    inner_optimizer: InnerOptimizer | None = None,
    loss_fn: Loss = F.cross_entropy,
    adapt: Adapt = None,
    prox: float = 0.0,
    per_step_support: bool = False,
    executor: str = "auto",
) -> AdaptedTasks:
    """Adapts a model to each of T tasks; the model itself is not changed.

    **Arguments:** as in `maml_step`; the result is detached, whatever requires grad.

    **Returns:** an `AdaptedTasks`.

    **Raises:** `TypeError` or `ValueError` naming the argument, before anything is computed.
    """
    options = Options(
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        loss_fn=loss_fn,
        adapt=adapt,
        prox=prox,
        per_step_support=per_step_support,
        executor=executor,
    )
    return adapt_tasks(model, support, options)


def adapt_tasks(model: nn.Module, support: Any, options: Options) -> AdaptedTasks:
    """`adapt`, of options that stand together."""
    model = plain_module(model)
    with torch.inference_mode(False), torch.no_grad(), planner.stepping(model) as seen:
        found = run_inner_loop(model, seen, outside_inference(support), options)
    first = found.step.groups[0][1]
    batched = first.selected.offer.at_a_time > 1
    return AdaptedTasks(first.problem.model, found.parameters, found.support_losses, batched)


@dataclass(frozen=True, eq=False)
class Adapted:
    """What the inner loop alone gives, in the order of the caller's tasks."""

    step: PlannedStep
    parameters: dict[str, Tensor]
    """Of what adapts, by name, `[T, ...]`."""
    support_losses: Tensor
    """[K, T]: the support loss before each inner step."""


def run_inner_loop(model: nn.Module, seen: Snapshot, support: Any, options: Options) -> Adapted:
    """The inner loop of all tasks; call under `no_grad` and `planner.stepping`."""
    step = plan_step(model, seen, support, None, options, False)
    outcomes = [planner.compute(planned) for _, planned in step.groups]
    order = [i for indices, _ in step.groups for i in indices]
    places = torch.tensor(order, device="cpu").argsort().to(step.task_weights.device)

    def in_order(parts: list[Tensor], dim: int) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return whole if len(parts) == 1 else whole.index_select(dim, places)

    parameters = {
        name: in_order([outcome.adapted[name] for outcome in outcomes], 0)
        for name in step.inner.adapted
    }
    support_losses = in_order([outcome.support_losses for outcome in outcomes], 1)
    return Adapted(step, parameters, support_losses)
