"""Layers that move no number: views, flattening, and passing on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmeta.network.layers.layer import Tensors
from fastmeta.network.layers.linear_map import LinearMap


class _Shape(LinearMap):
    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 0

    def transpose(self, gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.reshape(x.shape)


@dataclass(frozen=True)
class Reshape(_Shape):
    """Any view that keeps the examples in front: `[N, *shape]`, one entry may be -1."""

    shape: tuple[int, ...]

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0].reshape(len(inputs[0]), *self.shape)

    def map(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], *self.shape)


@dataclass(frozen=True)
class Flatten(_Shape):
    """Joins dimensions `start` to `end` of `[N, ...]`; `start` is at least 1."""

    start: int
    end: int

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(self.start, self.end)

    def map(self, x: Tensor) -> Tensor:
        return x.flatten(self.start + 1, self.end + 1 if self.end >= 0 else self.end)


@dataclass(frozen=True)
class Identity(_Shape):
    """What passes its input on: `nn.Identity`, dropout in `eval()`."""

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def map(self, x: Tensor) -> Tensor:
        return x
