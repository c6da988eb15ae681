"""The standard losses: written out, weighted and checked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Loss:
    """A standard loss with mean reduction; `options` holds what differs from its defaults."""

    kind: str
    options: Mapping[str, Any]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean over all examples, as torch computes it."""
        return getattr(F, self.kind)(prediction, target, **self.options)

    def weighted(self, prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """The mean over the examples with weight: `weights` is `[N]`, zero on the padding."""
        if self.kind == "cross_entropy" and not target.is_floating_point():
            return self._weighted_cross_entropy(prediction, target, weights)
        if self.kind in ("huber_loss", "smooth_l1_loss"):
            each = self._huber(prediction, target)
        elif self.kind == "mse_loss":
            each = (prediction - target).square()
        else:
            each = getattr(F, self.kind)(prediction, target, **self.options, reduction="none")
        each = each.flatten(1).mean(1) if each.dim() > 1 else each
        return (each * weights.to(each.dtype)).sum()

    def check(self, label: str, target: Any, prediction: tuple[int, ...]) -> None:
        """Refuses targets `[T, N, ...]` that do not fit predictions `[N, ...]` of one task.

        Label values are read where that costs no synchronisation, on the CPU.
        """
        if not isinstance(target, Tensor):
            return
        shape = tuple(target.shape[1:])
        prediction = (target.shape[1], *prediction[1:])
        if self.kind == "cross_entropy" and not target.is_floating_point():
            self._check_labels(label, target, prediction)
        elif shape != prediction:
            raise ValueError(
                f"{label}: shape {list(target.shape)}, but {self.kind} compares it with "
                f"predictions of [T, N, ...] = {[target.shape[0], *prediction]}; both need the "
                "same shape"
            )
        elif not target.is_floating_point():
            raise TypeError(
                f"{label}: {target.dtype}, but {self.kind} needs floating-point targets"
            )

    @cached_property
    def structure(self) -> Hashable:
        """The part that a plan depends on: the kind, and the forms of the options, not values."""
        forms = (
            (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v == 0
            for v in self.options.values()
        )  # fmt: skip
        return self.kind, *self.options, *forms

    def equals(self, other: Loss) -> bool:
        """Return whether a loss of the same structure has the same options: tensors by identity."""
        return all(
            value is there or (not isinstance(value, Tensor) and value == there)
            for value, there in zip(self.options.values(), other.options.values(), strict=True)
        )

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name}={'tensor' if isinstance(value, Tensor) else value}"
            for name, value in self.options.items()
        )
        return f"{self.kind}({shown})" if shown else self.kind

    def _huber(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        size = error.abs()
        if self.kind == "huber_loss":
            delta = self.options.get("delta", 1.0)
            return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
        beta = self.options.get("beta", 1.0)
        if beta == 0:
            return size
        return torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)

    def _weighted_cross_entropy(
        self, prediction: Tensor, target: Tensor, weights: Tensor
    ) -> Tensor:
        # Padding becomes a label that torch itself leaves out of the mean.
        ignore = self.options.get("ignore_index", -100)
        shape = (-1,) + (1,) * (target.dim() - 1)
        real = (weights > 0).view(shape)
        return self(prediction, torch.where(real, target, ignore))

    def _check_labels(self, label: str, target: Tensor, prediction: tuple[int, ...]) -> None:
        if len(prediction) < 2:
            raise ValueError(
                f"model: gives {[target.shape[0], *prediction]} for {label} = "
                f"{list(target.shape)}, but class labels need predictions of [T, N, C]; for "
                "regression write loss_fn=torch.nn.functional.mse_loss and float targets"
            )
        expected = (prediction[0], *prediction[2:])
        if tuple(target.shape[1:]) != expected:
            raise ValueError(
                f"{label}: shape {list(target.shape)}, but class labels for predictions of "
                f"[T, N, C, ...] = {[target.shape[0], *prediction]} must be "
                f"{[target.shape[0], *expected]}"
            )
        if target.dtype != torch.int64:
            raise TypeError(f"{label}: {target.dtype}; class labels must be torch.int64")
        if target.device.type != "cpu":
            return
        classes, ignore = prediction[1], self.options.get("ignore_index", -100)
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= classes:
            outside = ((target < 0) | (target >= classes)) & (target != ignore)
            if outside.any():
                where = outside.nonzero()[0].tolist()
                raise ValueError(
                    f"{label}: label {int(target[tuple(where)])} at {where}; the model gives "
                    f"{classes} classes, so labels must be in 0 .. {classes - 1}"
                )


def objective(
    loss_fn: Callable[[Any, Any], Tensor], loss: Loss | None
) -> Callable[[Any, Any, Tensor | None], Tensor]:
    """`(prediction, targets, weights) -> mean loss` for an executor."""

    def mean_loss(prediction: Any, targets: Any, weights: Tensor | None) -> Tensor:
        if weights is None:
            return loss_fn(prediction, targets)
        assert loss is not None, "only recognised losses are padded"
        return loss.weighted(prediction, targets, weights)

    return mean_loss
