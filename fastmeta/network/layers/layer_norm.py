"""Normalisation over the last dimensions of each example, also by the root mean square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.example_norm import ExampleNorm
from fastmeta.network.layers.layer import Tensors, named


class OverLast(ExampleNorm):
    """Over the last dimensions of `[N, ...]`, of sizes `shape`, which its parameters have too."""

    shape: tuple[int, ...]

    def mean(self, x: Tensor) -> Tensor:
        return x.mean([*range(-len(self.shape), 0)], keepdim=True)

    def spread(self, r: Tensor, x: Tensor) -> Tensor:
        return r

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(-1, *(1,) * (x.dim() - len(self.shape) - 1), *self.shape)

    def narrow(self, product: Tensor) -> Tensor:
        return product.sum(tuple(range(1, product.dim() - len(self.shape))))


@dataclass(frozen=True)
class LayerNorm(OverLast):
    """By mean and standard deviation."""

    shape: tuple[int, ...]
    weight: str | None
    bias: str | None
    eps: float

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        weight, bias = named(tensors, self.weight), named(tensors, self.bias)
        return F.layer_norm(inputs[0], self.shape, weight, bias, self.eps)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, None, None, self.eps)

    def projected(self, u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        only_input = [True, False, False]
        return _backward(u, x, self.shape, mean, r, None, None, only_input)[0]


@dataclass(frozen=True)
class RMSNorm(OverLast):
    """By the root mean square.

    `h = r x`, `r = 1 / sqrt(m(x²) + eps)`, `P(u) = r (u - m(h u) h)`.
    """

    shape: tuple[int, ...]
    weight: str | None
    eps: float | None
    """None is the dtype's own: `torch.finfo(dtype).eps`."""
    bias: str | None = None

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs[0], self.shape, named(tensors, self.weight), self.eps)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = (self.mean(x * x) + self.eps_in(x.dtype)).rsqrt()
        return x * r, r, r

    def projected(self, u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        h = x * r
        return r * (u - self.mean(h * u) * h)

    def eps_in(self, dtype: torch.dtype) -> float:
        """What is added to the mean square of numbers of a dtype."""
        return torch.finfo(dtype).eps if self.eps is None else self.eps


_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.native_layer_norm_backward
