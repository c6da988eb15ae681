"""Clipping of a task's gradient by its norm over all parameters that adapt."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.inner.optimizer import Tensors


def root(square: Tensor) -> Tensor:
    """The square root, with derivative 0 where the argument is not positive.

    Both derivatives stay finite there: the root is taken of 1 in its place.
    """
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


class Clipping:
    """One clipping by norm, forward and back: `g c / n` where `n = |g| > c`.

    PyTorch's `clip_grad_norm_` divides by `n + 1e-6`; this is exact.
    """

    def __init__(self, gradients: Tensors, largest: float) -> None:
        """`gradients` by name, `[T, ...]`."""
        self._gradients = gradients
        norm = root(_dot(gradients, gradients))  # [T]
        self._clips = norm > largest
        self._norm = torch.where(self._clips, norm, 1.0)
        self._factor = torch.where(self._clips, largest / self._norm, 1.0)

    def clipped(self) -> Tensors:
        """The gradients, clipped."""
        return {name: g * _like(self._factor, g) for name, g in self._gradients.items()}

    def pullback(self, gammas: Tensors) -> Tensors:
        """Cotangents of the gradients from those of the clipped: `c/n (gamma - g (g.gamma)/n^2)`.

        A norm beyond the range of its dtype leaves nothing, as its gradient is 0.
        """
        along = torch.where(self._clips, _dot(self._gradients, gammas), 0.0)  # [T]
        along = along / self._norm / self._norm
        return {
            name: _like(self._factor, gamma) * (gamma - self._gradients[name] * _like(along, gamma))
            for name, gamma in gammas.items()
        }


def _dot(one: Tensors, other: Tensors) -> Tensor:
    """Inner products of each task's tensors, at least in float32, `[T]`."""
    total: Tensor | None = None
    for name, each in one.items():
        dtype = torch.promote_types(each.dtype, torch.float32)
        part = (each.to(dtype) * other[name].to(dtype)).reshape(len(each), -1).sum(1)
        total = part if total is None else total + part
    assert total is not None
    return total


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """`[T]` as `[T, 1, ...]` in the dtype of a tensor `[T, ...]`."""
    return values.to(tensor.dtype).view(-1, *(1,) * (tensor.dim() - 1))
