"""`adapt`: the inner loop alone, for testing and deployment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from fastmeta.arguments import outside_inference, plain_module, plan_step
from fastmeta.executors.problem import StatelessModel
from fastmeta.inner_loop import Adapt, Rates
from fastmeta.plan import planner
from fastmeta.tasks import Tree, check_inputs, map_tensors, unstack


class AdaptedTasks:
    """T adapted copies of one model: a batched function, and a sequence of modules.

    `tasks(x)` evaluates `x [T, Q, ...]`, each task by its own parameters (a list with one
    `[Q, ...]` a task gives a list); `tasks[i]` is task `i` as an ordinary module of its own;
    `len(tasks)` is T.
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
        named = dict(module.named_parameters())
        for parameter in named.values():
            parameter.grad = None
        with torch.no_grad():
            for name, value in self.parameters.items():
                named[name].copy_(value[index])
        return module

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(len(self)))

    def __call__(self, x: Tree) -> Tree:
        """Predictions `[T, Q, ...]` for inputs `[T, Q, ...]`.

        **Raises** `ValueError` where `x` has another number of tasks.
        """
        scratch = self._model.scratch()
        if isinstance(x, list):
            if len(x) != len(self):
                raise ValueError(f"x: {len(x)} tasks, but {len(self)} were adapted")
            return [self._model(self._of(i), inputs, scratch) for i, inputs in enumerate(x)]
        check_inputs("x", x, len(self))
        if self._batched:
            size = len(self)
            batched = {name: b.expand(size, *b.shape) for name, b in scratch.items()}
            function = vmap(self._model, in_dims=(0, 0, 0), randomness="different")
            return function(self.parameters, x, batched)
        outputs = [
            self._model(self._of(i), inputs, scratch)
            for i, inputs in enumerate(unstack(x, len(self)))
        ]
        return map_tensors(lambda *rows: torch.stack(rows), outputs[0], *outputs[1:])

    def _of(self, task: int) -> dict[str, Tensor]:
        return {name: value[task] for name, value in self.parameters.items()}


def adapt(
    model: nn.Module,
    support: Any,
    *,
    inner_lr: Rates = 0.01,
    inner_steps: int = 1,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    adapt: Adapt = None,
    prox: float = 0.0,
    executor: str = "auto",
) -> AdaptedTasks:
    """Adapts a model to each of T tasks; the model itself is not changed.

    **Arguments:** as in `maml_step`; the result is detached, whatever requires grad.

    **Returns:** an `AdaptedTasks`.

    **Raises:** `TypeError` or `ValueError` naming the argument, before anything is computed.
    """
    if torch.is_inference_mode_enabled():
        support = outside_inference(support)
    with torch.inference_mode(False), torch.no_grad():
        step = plan_step(
            plain_module(model),
            outside_inference(support),
            None,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            loss_fn=loss_fn,
            adapt=adapt,
            prox=prox,
            executor=executor,
            differentiate=False,
        )
        outcomes = [planner.compute(planned) for _, planned in step.groups]
        order = torch.tensor([i for indices, _ in step.groups for i in indices]).argsort()
        order = order.to(step.task_weights.device)

        def in_order(parts: list[Tensor], dim: int) -> Tensor:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
            return whole if len(parts) == 1 else whole.index_select(dim, order)

        parameters = {
            name: in_order([outcome.adapted[name] for outcome in outcomes], 0)
            for name in step.inner.adapted
        }
        support_losses = in_order([outcome.support_losses for outcome in outcomes], 1)
    first = step.groups[0][1]
    return AdaptedTasks(
        first.problem.model, parameters, support_losses, first.choice.form == "vmap"
    )
