"""Normalisation of groups of channels of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers import images
from fastmeta.network.layers.example_norm import ExampleNorm
from fastmeta.network.layers.layer import Tensors, named


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
        return self._spread(channels.unflatten(2, (self.groups, -1)).mean(3), x)

    def centred(self, x: Tensor) -> Tensor:
        """Without the mean: channels last, torch's kernel takes the variance from squares' sums."""
        return x - self.mean(x)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, r = torch.native_group_norm(
            _batch(x), None, None, *self._sizes(x), self.groups, self.eps
        )
        return y.unflatten(0, x.shape[:2]), mean, r

    def spread(self, r: Tensor, x: Tensor) -> Tensor:
        return self._spread(r.unflatten(0, x.shape[:2]), x)

    def projected(self, u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        only_input = [True, False, False]
        found, *_ = _backward(
            _batch(u), _batch(x), mean, r, None, *self._sizes(x), self.groups, only_input
        )
        return found.unflatten(0, x.shape[:2])

    def _spread(self, groups: Tensor, x: Tensor) -> Tensor:
        """`[T, N, G]` as `[T, N, C, 1, ...]`."""
        wide = groups.unsqueeze(3).expand(-1, -1, -1, x.shape[2] // self.groups).flatten(2)
        return wide.view(*wide.shape, *(1,) * (x.dim() - 3))

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        """Examples of all tasks, channels, pixels."""
        return x.shape[0] * x.shape[1], x.shape[2], x.shape[3:].numel()

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.view(len(parameter), 1, -1, *(1,) * (x.dim() - 3))

    def narrow(self, product: Tensor) -> Tensor:
        return product.sum((1, *range(3, product.dim())))


_backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.native_group_norm_backward


def _batch(x: Tensor) -> Tensor:
    return images.joined(x) if x.dim() == 5 else x.flatten(0, 1)
