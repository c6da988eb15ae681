"""2-d convolution, each task by its own weights or all by the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers import images
from fastmeta.network.layers.layer import Tensors, named
from fastmeta.network.layers.product import Product

_GROUPED_BELOW = 8 << 20
"""Multiply-adds of one task below which all tasks go as groups of one convolution (measured:
docs/design.md, "The layers' rules")."""


@dataclass(frozen=True)
class Conv2d(Product):
    """A 2-d convolution, zero-padded."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        bias = named(tensors, self.bias)
        return self._convolve(inputs[0], tensors[self.weight], bias, self.groups)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 2 * output.numel() * math.prod(tensors[self.weight].shape[1:])

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        tasks, batch = len(x), images.joined(x)
        if len(weight) == 1:
            return _split(self._convolve(batch, weight[0], None, self.groups), tasks)
        if self._small(x, weight):
            y = self._convolve(_grouped(batch, tasks), weight.flatten(0, 1), None, self._all(tasks))
            return _ungrouped(y, tasks)
        pairs = zip(batch.chunk(tasks), weight, strict=True)
        return _joined([self._convolve(x, w, None, self.groups) for x, w in pairs], tasks)

    def to_input(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        tasks, dy, batch = len(x), images.joined(gradient), images.joined(x)
        if len(weight) == 1:
            return _split(self._backward(dy, batch, weight[0], self.groups, 0), tasks)
        if self._small(x, weight):
            of_groups = _grouped(dy, tasks), _grouped(batch, tasks), weight.flatten(0, 1)
            return _ungrouped(self._backward(*of_groups, self._all(tasks), 0), tasks)
        triples = zip(dy.chunk(tasks), batch.chunk(tasks), weight, strict=True)
        return _joined([self._backward(*each, self.groups, 0) for each in triples], tasks)

    def to_weight(self, gradient: Tensor, x: Tensor, weight: Tensor, count: int) -> Tensor:
        tasks, dy, batch = len(x), images.joined(gradient), images.joined(x)
        like = weight[0]
        if count == 1:  # One product over all tasks' examples.
            return self._backward(dy, batch, like, self.groups, 1).unsqueeze(0)
        if self._small(x, weight):
            shape = torch.broadcast_to(like, (tasks, *like.shape)).flatten(0, 1)
            of_groups = _grouped(dy, tasks), _grouped(batch, tasks), shape
            return self._backward(*of_groups, self._all(tasks), 1).unflatten(0, (tasks, -1))
        pairs = zip(dy.chunk(tasks), batch.chunk(tasks), strict=True)
        return torch.stack([self._backward(*each, like, self.groups, 1) for each in pairs])

    def to_bias(self, gradient: Tensor) -> Tensor:
        return images.rows(gradient).sum(1)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y.add_(bias.view(len(bias), 1, -1, 1, 1))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def _backward(self, dy: Tensor, x: Tensor, weight: Tensor, groups: int, of: int) -> Tensor:
        """The gradient of the input (0) or of the weight (1)."""
        backward: Callable[..., list[Tensor]] = torch.ops.aten.convolution_backward
        mask = [of == 0, of == 1, False]
        return backward(
            dy, x, weight, None, self.stride, self.padding, self.dilation, False, (0, 0), groups,
            mask,
        )[of]  # fmt: skip

    def _all(self, tasks: int) -> int:
        return tasks * self.groups

    def _small(self, x: Tensor, weight: Tensor) -> bool:
        """Whether one grouped call for all tasks beats a call for each."""
        pixels = x.shape[1] * math.prod(x.shape[-2:]) // math.prod(self.stride)
        return len(x) > 1 and pixels * math.prod(weight.shape[1:]) < _GROUPED_BELOW


def _split(y: Tensor, tasks: int) -> Tensor:
    return y.unflatten(0, (tasks, -1))


def _joined(parts: list[Tensor], tasks: int) -> Tensor:
    return _split(images.stacked(parts), tasks)


def _grouped(batch: Tensor, tasks: int) -> Tensor:
    """`[T N, C, H, W]` as `[N, T C, H, W]`."""
    return _split(batch, tasks).transpose(0, 1).flatten(1, 2)


def _ungrouped(y: Tensor, tasks: int) -> Tensor:
    """`[N, T C, H, W]` as `[T, N, C, H, W]`."""
    return y.unflatten(1, (tasks, -1)).transpose(0, 1)
