"""Normalisation of groups of channels of each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastmeta.layers.example_norm import ExampleNorm
from fastmeta.layers.layer import Tensors, named


@dataclass(frozen=True)
class GroupNorm(ExampleNorm):
    """Of `[N, C, ...]`, each of `groups` equal parts of the channels; scale and shift `[C]`."""

    groups: int
    weight: str | None
    bias: str | None
    eps: float

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        weight, bias = named(tensors, self.weight), named(tensors, self.bias)
        return F.group_norm(inputs[0], self.groups, weight, bias, self.eps)

    def mean(self, x: Tensor) -> Tensor:
        channels = x.mean([*range(3, x.dim())]) if x.dim() > 3 else x  # however they lie in memory
        groups = channels.unflatten(2, (self.groups, -1)).mean(3, keepdim=True)
        wide = groups.expand(-1, -1, -1, x.shape[2] // self.groups).flatten(2)
        return wide.view(*wide.shape, *(1,) * (x.dim() - 3))

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(len(parameter), 1, -1, *(1,) * (x.dim() - 3))

    def narrow(self, product: Tensor) -> Tensor:
        return product.sum((1, *range(3, product.dim())))
