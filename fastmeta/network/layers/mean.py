"""The mean over dimensions of each example, of which global pooling is the most common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastmeta.network.layers.layer import Tensors
from fastmeta.network.layers.linear_map import LinearMap


@dataclass(frozen=True)
class Mean(LinearMap):
    """The mean over `dims` of `[N, ...]`, each at least 1."""

    dims: tuple[int, ...]
    keepdim: bool

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0].mean(self.dims, keepdim=self.keepdim)

    def map(self, x: Tensor) -> Tensor:
        return x.mean(self._dims(), keepdim=self.keepdim)

    def transpose(self, gradient: Tensor, x: Tensor) -> Tensor:
        for dim in () if self.keepdim else sorted(self._dims()):
            gradient = gradient.unsqueeze(dim)
        return (gradient / math.prod(x.shape[dim] for dim in self._dims())).expand_as(x)

    def _dims(self) -> tuple[int, ...]:
        return tuple(dim + 1 for dim in self.dims)  # The tasks stand in front.
