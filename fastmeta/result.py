"""What a step of an algorithm gives back, and its way into autograd."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.tasks import Tree


@dataclass(frozen=True, eq=False)
class MetaStep:
    """What a meta-step gives back.

    Only `loss` is differentiable; the rest is detached. Symbols: T tasks, Q query examples,
    K inner steps.
    """

    loss: Tensor
    """0-d: `sum_t task_weights[t] * task_losses[t]`. `backward()` adds the meta-gradient."""
    task_losses: Tensor
    """[T]: each task's query loss, weighted over steps by `step_weights`."""
    query_outputs: Tree
    """[T, Q, ...]: the adapted models' predictions; a list with one entry a task if ragged."""
    support_losses: Tensor
    """[K, T]: the support loss before each inner step, without the proximal term."""
    executor: str
    """What computed the step, for example `"generic"`."""

    def __repr__(self) -> str:
        loss, tasks = self.loss.detach(), len(self.task_losses)
        return f"{type(self).__name__}(loss={loss}, tasks={tasks}, executor={self.executor!r})"


_EXACT = (torch.float32, torch.float64)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """`weights [N]` times `values [N, ...]`, summed; no matrix product, which autocast rounds."""
    if values.dim() == 1 and weights.dtype == values.dtype in _EXACT:
        return torch.dot(weights, values)
    shape = (-1,) + (1,) * (values.dim() - 1)
    return (weights.to(values.dtype).view(shape) * values).sum(0)


def with_gradients(loss: Tensor, pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The loss, whose `backward()` adds to leaves the gradients that they are paired with."""
    reached = [(leaf, gradient) for leaf, gradient in pairs if gradient is not None]
    if not reached:
        return loss
    leaves, gradients = zip(*reached, strict=True)
    # A leaf that several groups of tasks reach stands there several times; autograd adds.
    return _MetaGradient.apply(loss, gradients, *leaves)


class _MetaGradient(torch.autograd.Function):
    """A loss whose gradients are known already; `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, scale: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(ctx.saved_tensors, scale)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.zeros((), requires_grad=True)
            scaled = [_NoThirdOrder.apply(g, anchor) for g in scaled]
        return (None, None, *scaled)


class _NoThirdOrder(torch.autograd.Function):
    """A meta-gradient that refuses to be differentiated once more, rather than be a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(
            "the meta-gradient of fastmeta is differentiable once: a loss made of it (a gradient "
            "penalty, a third level) has no gradient here"
        )
