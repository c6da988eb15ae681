"""Normalisation over the last dimensions of each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastmeta.layers.example_norm import ExampleNorm
from fastmeta.layers.layer import Tensors, named


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

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(-1, *(1,) * (x.dim() - len(self.shape) - 1), *self.shape)

    def narrow(self, product: Tensor) -> Tensor:
        return product.sum(tuple(range(1, product.dim() - len(self.shape))))
