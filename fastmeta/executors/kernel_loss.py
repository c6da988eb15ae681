"""A standard loss as the compiled kernels take it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta.executors.base import NotSupported
from fastmeta.executors.problem import Problem
from fastmeta.network.losses.standard import Loss
from fastmeta.tasks import Examples

# In the order of csrc/network.h.
_LOSSES = (
    "cross_entropy", "mse_loss", "binary_cross_entropy_with_logits", "huber_loss",
    "smooth_l1_loss", "l1_loss",
)  # fmt: skip


@dataclass(frozen=True)
class KernelLoss:
    """A loss by its number, its option and its weights."""

    kind: int
    option: float
    ignore_index: int
    weighted: bool = False
    """Whether the loss has weights."""
    weight: Tensor | None = field(default=None, compare=False)
    pos_weight: Tensor | None = field(default=None, compare=False)

    @property
    def of_classes(self) -> bool:
        """Whether targets are classes, or probabilities of classes."""
        return self.kind == 0

    def weigh(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The targets and weights of a weighted loss as the kernels take them."""
        weight, pos_weight = self.weight, self.pos_weight
        if self.of_classes:
            return y, None if weight is None else weight.contiguous()
        # w ((1 - y) z + (1 + (p - 1) y) softplus(-z)) is c softplus(z) - t z with these c and t.
        positive = y if pos_weight is None else y * pos_weight
        factors = 1 - y + positive
        if weight is not None:
            positive, factors = positive * weight, factors * weight
        return positive, factors.contiguous()

    def check(
        self, problem: Problem, examples: Examples, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """**Raises** `NotSupported` where predictions `[N, *shape]` don't fit its weights."""
        for weight in (self.weight, self.pos_weight):
            if weight is None:
                continue
            if weight.dtype != dtype or weight.device != problem.task_weights.device:
                raise NotSupported(
                    f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
                )
            if self.of_classes:
                continue  # torch has refused what is not one number a class
            row = (examples.count, *shape)
            try:
                fits = torch.broadcast_shapes(weight.shape, row) == row
            except RuntimeError:
                fits = False
            if not fits:
                raise NotSupported(
                    f"the loss's weights {list(weight.shape)} don't broadcast to {list(row)}"
                )


def kernel_loss(loss: Loss) -> KernelLoss:
    """The loss in the kernels' terms; **raises** `NotSupported`."""
    options = loss.options
    if loss.kind == "smooth_l1_loss" and options.get("beta", 1.0) == 0:
        raise NotSupported("smooth_l1_loss has beta=0")
    option = options.get("label_smoothing", options.get("delta", options.get("beta")))
    default = 0.0 if loss.kind == "cross_entropy" else 1.0
    weight, pos_weight = options.get("weight"), options.get("pos_weight")
    return KernelLoss(
        _LOSSES.index(loss.kind),
        default if option is None else float(option),
        int(options.get("ignore_index", -100)),
        weight is not None or pos_weight is not None,
        weight,
        pos_weight,
    )
