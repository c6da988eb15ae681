"""The rules of the standard losses, each a mean over the examples of a task.

Class weights, smoothing, ignored labels, the weights of examples and the mean itself are put into
factors once a set of data, so that the rules know none of them:

    cross-entropy    L = sum_n (c_n logsumexp z_n - <t_n, z_n>)       c_n the sum of t_n
    binary           L = sum (c softplus(z) - t z)
    the others       L = sum c f(z - t)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.layer import Batch


class PreparedLoss:
    """A loss on one set, of predictions `[T, N, ...]`."""

    def value(self, z: Tensor) -> Tensor:
        """`[T]`."""
        raise NotImplementedError

    def gradient(self, z: Tensor) -> Tensor:
        """Of the sum over tasks, `[T, N, ...]`."""
        raise NotImplementedError

    def tangent(self, z: Tensor, rz: Tensor) -> Tensor:
        """The gradient's derivative along `rz`, `[T, N, ...]`."""
        raise NotImplementedError

    def capture(self, z: Tensor, weights: Tensor) -> None:
        """Add to gradients of what else the loss reaches; nothing where that is known."""

    def release(self, z: Tensor) -> None:
        """Drop what was kept for further calls at these predictions."""


def prepare(
    kind: str, options: Mapping[str, Any], target: Tensor, batch: Batch, like: Tensor
) -> PreparedLoss:
    """A loss of `torch.nn.functional` on targets `[T, N, ...]`, for predictions like `like`."""
    if kind == "cross_entropy":
        given = target.to(like.dtype) if target.is_floating_point() else target
        return _CrossEntropy(options, given, batch, like)
    each = _each(target, batch)
    if kind == "binary_cross_entropy_with_logits":
        return _Binary(options, target, each)
    return _OfError(kind, options, target, each)


def _each(target: Tensor, batch: Batch) -> Tensor:
    """What a number of an example counts in its task's mean, broadcast to `[T, N, ...]`."""
    if batch.weights is None:
        # Filled on the device: a copy from the host would wait for it.
        return target.new_full((), 1 / max(1, target[0].numel()))
    shape = (*batch.weights.shape, *(1,) * (target.dim() - 2))
    return batch.weights.to(target.dtype).view(shape) / max(1, target[0, 0].numel())


def _per_task(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


class _CrossEntropy(PreparedLoss):
    """The classes of a prediction are its dimension 2, behind tasks and examples."""

    def __init__(
        self, options: Mapping[str, Any], target: Tensor, batch: Batch, like: Tensor
    ) -> None:
        weight = options.get("weight")
        smoothing, classes = float(options.get("label_smoothing", 0.0)), like.shape[2]
        wide = (1, 1, -1, *(1,) * (like.dim() - 3))
        of_class = like.new_ones(1) if weight is None else weight.to(like).view(wide)
        self._unlabeled: Tensor | None = None  # [T], of tasks without a label that counts
        if target.is_floating_point():
            each = _each(target, batch) * classes  # A mean over pixels, not over classes.
            self._target = (target * (1 - smoothing) + smoothing / classes) * of_class * each
        else:
            real = target != options.get("ignore_index", -100)
            if batch.weights is not None:
                shape = (*batch.weights.shape, *(1,) * (target.dim() - 2))
                real = real & (batch.weights > 0).view(shape)
            labels = torch.where(real, target, 0).unsqueeze(2)
            shown = real.unsqueeze(2).to(like.dtype)
            hot = torch.zeros_like(like).scatter_(2, labels, shown) * of_class
            # As in torch, their loss is no number and their gradient is zero.
            unlabeled = self._unlabeled = ~real.flatten(1).any(1)
            total = torch.where(unlabeled, 1, _per_task(hot))
            total = total.view(-1, *(1,) * (like.dim() - 1))
            smooth = smoothing / classes * of_class * shown
            self._target = (hot * (1 - smoothing) + smooth) / total
        self._mass = self._target.sum(2, keepdim=True)

    def value(self, z: Tensor) -> Tensor:
        value = -_per_task(self._target * F.log_softmax(z, 2))
        return value if self._unlabeled is None else value.masked_fill(self._unlabeled, torch.nan)

    def gradient(self, z: Tensor) -> Tensor:
        return self._mass * z.softmax(2) - self._target

    def tangent(self, z: Tensor, rz: Tensor) -> Tensor:
        p = z.softmax(2)
        return self._mass * p * (rz - (p * rz).sum(2, keepdim=True))


class _Binary(PreparedLoss):
    def __init__(self, options: Mapping[str, Any], target: Tensor, each: Tensor) -> None:
        weight, of_positives = options.get("weight"), options.get("pos_weight")
        # w ((1 - y) z + (1 + (p - 1) y) softplus(-z)) is c softplus(z) - t z with these c and t.
        positive = target if of_positives is None else target * of_positives
        mass = 1 - target + positive
        if weight is not None:
            positive, mass = positive * weight, mass * weight
        self._target, self._mass = positive * each, mass * each

    def value(self, z: Tensor) -> Tensor:
        return _per_task(self._mass * F.softplus(z) - self._target * z)

    def gradient(self, z: Tensor) -> Tensor:
        return self._mass * z.sigmoid() - self._target

    def tangent(self, z: Tensor, rz: Tensor) -> Tensor:
        s = z.sigmoid()
        return self._mass * s * (1 - s) * rz


class _OfError(PreparedLoss):
    """Squares near zero, straight lines beyond the knee, times a factor."""

    def __init__(self, kind: str, options: Mapping[str, Any], target: Tensor, each: Tensor) -> None:
        self._target = target
        self._knee, factor = float("inf"), 1.0
        if kind == "mse_loss":
            factor = 2.0
        elif kind == "huber_loss":
            self._knee = float(options.get("delta", 1.0))
        elif kind == "smooth_l1_loss":
            self._knee = float(options.get("beta", 1.0))
            factor = 1 / self._knee if self._knee else 1.0
        else:
            self._knee = 0.0
        self._factor = factor * each

    def value(self, z: Tensor) -> Tensor:
        size = (z - self._target).abs()
        if self._knee == 0:
            return _per_task(self._factor * size)
        near = size.clamp(max=self._knee)
        return _per_task(self._factor * near * (size - 0.5 * near))

    def gradient(self, z: Tensor) -> Tensor:
        error = z - self._target
        slope = error.sign() if self._knee == 0 else error.clamp(-self._knee, self._knee)
        return self._factor * slope

    def tangent(self, z: Tensor, rz: Tensor) -> Tensor:
        return self._factor * torch.where((z - self._target).abs() < self._knee, rz, 0.0)
