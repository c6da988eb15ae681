"""A loss of any kind, computed by torch at the prediction: the network's passes stay compiled.

The loss of each task is a small graph on that task's predictions; autograd gives its gradient, and
the product of its Hessian, for all tasks at once. Tensors that require grad and that the loss
reaches (its own parameters, what it closes over) get their gradients: with z the predictions and
r z their tangent along the vector of a Hessian product,

    dL/dc += w_k d L_q(z; c) / dc + d <grad_z L_s(z; c), r z> / dc
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.losses.mapping import over_tasks
from fastmeta.network.losses.rules import PreparedLoss
from fastmeta.network.tape import captured_leaves
from fastmeta.tasks import Tree, unstack

Objective = Callable[[Any, Tree, Tensor | None], Tensor]
"""`(prediction, targets, weights)` of one task to its mean loss."""

_engine: Any = torch.autograd.Variable._execution_engine


@dataclass(eq=False)
class _At:
    """The loss at some predictions, on the tape."""

    z: Tensor
    losses: Tensor
    gradient: Tensor | None = None


class OpenLoss(PreparedLoss):
    """A loss on one set, of predictions `[T, N, ...]` and targets of any structure."""

    def __init__(self, objective: Objective, targets: Tree, tasks: int) -> None:
        self._objective, self._targets, self._tasks = objective, targets, tasks
        self._maps = True
        self._ones: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, _At]] = {}
        self.captured: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity, the leaves that the loss reaches and their gradients so far."""

    def value(self, z: Tensor) -> Tensor:
        return self._at(z).losses.detach()

    @torch.enable_grad()
    def gradient(self, z: Tensor) -> Tensor:
        at = self._at(z)
        if at.gradient is None:
            if self._ones is None:
                self._ones = torch.ones_like(at.losses)
            (gradient,) = self._derivatives(at.losses, [at.z], self._ones, create_graph=True)
            at.gradient = torch.zeros_like(z) if gradient is None else gradient
        return at.gradient.detach()

    @torch.enable_grad()
    def tangent(self, z: Tensor, rz: Tensor) -> Tensor:
        self.gradient(z)
        at = self._at(z)
        assert at.gradient is not None
        leaves = captured_leaves([at.losses], [at.z])
        product, *found = self._derivatives(at.gradient, [at.z, *leaves], rz)
        self._add(leaves, found)
        return torch.zeros_like(z) if product is None else product

    @torch.enable_grad()
    def capture(self, z: Tensor, weights: Tensor) -> None:
        """Add the gradients of `sum_t weights[t] L_t` by the leaves that the loss reaches."""
        losses = self._at(z).losses
        leaves = captured_leaves([losses], [self._at(z).z])
        self._add(leaves, self._derivatives(losses, leaves, weights.to(losses)))

    def release(self, z: Tensor) -> None:
        """Forget the graph at these predictions."""
        self._kept.pop(id(z), None)

    def _at(self, z: Tensor) -> _At:
        kept = self._kept.get(id(z))
        if kept is None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                kept = self._kept[id(z)] = z, _At(leaf, self._losses(leaf))
        return kept[1]

    def _losses(self, z: Tensor) -> Tensor:
        """`[T]`."""
        if self._maps and self._tasks > 1:
            try:
                objective = self._objective
                return over_tasks(lambda one, y: objective(one, y, None), z, self._targets)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, UserWarning):
                # What vmap can't map, or would with a warning where these are errors; any other
                # error comes again below.
                self._maps = False
        each = zip(z.unbind(0), unstack(self._targets, self._tasks), strict=True)
        return torch.stack([self._objective(one, y, None) for one, y in each])

    def _derivatives(
        self, of: Tensor, by: list[Tensor], along: Tensor, create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        if not of.requires_grad or not by:
            return [None] * len(by)
        # torch.autograd.grad without its checks, which take a third of its time here.
        return _engine.run_backward(
            (of,), (along,), True, create_graph, tuple(by), allow_unreachable=True,
            accumulate_grad=False,
        )  # fmt: skip

    def _add(self, leaves: list[Tensor], found: Sequence[Tensor | None]) -> None:
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                there = self.captured.get(id(leaf))
                self.captured[id(leaf)] = leaf, gradient if there is None else there[1] + gradient


def captured(losses: Iterable[OpenLoss]) -> list[tuple[Tensor, Tensor]]:
    """The leaves that losses reach, each with the sum of its gradients."""
    total: dict[int, tuple[Tensor, Tensor]] = {}
    for key, (leaf, gradient) in (item for loss in losses for item in loss.captured.items()):
        total[key] = leaf, gradient + total[key][1] if key in total else gradient
    return [*total.values()]
