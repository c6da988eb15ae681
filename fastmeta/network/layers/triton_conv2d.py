"""The convolution by Triton's kernels, all tasks in one launch: the rules of `Conv2d`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmeta.network.layers.conv2d import Conv2d

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TritonConv2d(Conv2d):
    """A 2-d convolution, zero-padded, where `executors/triton_device.py` finds nothing missing."""

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.apply_all([(x, weight)])

    def to_input(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return self.all_to_input([(gradient, weight)], x)

    def to_weight(self, gradient: Tensor, x: Tensor, weight: Tensor, count: int) -> Tensor:
        return self.all_to_weight([(gradient, x)], weight, count)

    def apply_all(self, pairs: Pairs) -> Tensor:
        return kernels("convolve").convolve(self.numbers(), pairs, self.size(*pairs[0]))

    def all_to_input(self, pairs: Pairs, x: Tensor) -> Tensor:
        return kernels("convolve").to_input(self.numbers(), pairs, tuple(x.shape[-2:]))

    def all_to_weight(self, pairs: Pairs, weight: Tensor, count: int) -> Tensor:
        if count == 1:  # One product over all tasks' examples.
            pairs = [(dy.flatten(0, 1)[None], x.flatten(0, 1)[None]) for dy, x in pairs]
        return kernels("convolve").to_weight(self.numbers(), pairs, tuple(weight.shape[1:]))

    def numbers(self) -> Any:
        """Stride, padding, dilation and groups, in the kernels' terms."""
        form = kernels("geometry").Convolution
        return form(self.stride, self.padding, self.dilation, self.groups)

    def size(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Height and width of the output."""
        return tuple(
            (
                x.shape[3 + i]
                + 2 * self.padding[i]
                - self.dilation[i] * (weight.shape[3 + i] - 1)
                - 1
            )
            // self.stride[i]
            + 1
            for i in range(2)
        )


def kernels(name: str) -> Any:
    """A module of kernels, which imports Triton."""
    return importlib.import_module(f"fastmeta.kernels.{name}")
