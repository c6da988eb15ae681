"""Normalisation over the last dimensions of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.example_norm import ExampleNorm
from fastmeta.network.layers.layer import Tensors, named


@dataclass(frozen=True)
class LayerNorm(ExampleNorm):
    """Over the last dimensions of `[N, ...]`, of sizes `shape`, which scale and shift have too."""

    shape: tuple[int, ...]
    weight: str | None
    bias: str | None
    eps: float

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        weight, bias = named(tensors, self.weight), named(tensors, self.bias)
        return F.layer_norm(inputs[0], self.shape, weight, bias, self.eps)

    def mean(self, x: Tensor) -> Tensor:
        return x.mean([*range(-len(self.shape), 0)], keepdim=True)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, None, None, self.eps)

    def spread(self, r: Tensor, x: Tensor) -> Tensor:
        return r

    def projected(self, u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        only_input = [True, False, False]
        return _backward(u, x, self.shape, mean, r, None, None, only_input)[0]

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(-1, *(1,) * (x.dim() - len(self.shape) - 1), *self.shape)

    def narrow(self, product: Tensor) -> Tensor:
        return product.sum(tuple(range(1, product.dim() - len(self.shape))))


_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.native_layer_norm_backward
