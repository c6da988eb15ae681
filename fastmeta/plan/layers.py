"""The layers that a network can be read into: what each is, and what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Parameters and buffers by name."""


@dataclass(frozen=True)
class Linear:
    """`x Wᵀ + b`."""

    weight: str
    bias: str | None

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return F.linear(x, tensors[self.weight], _maybe(tensors, self.bias))

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 2 * output.numel() * tensors[self.weight].shape[1]


@dataclass(frozen=True)
class Conv2d:
    """A 2-d convolution, zero-padded."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return F.conv2d(
            x,
            tensors[self.weight],
            _maybe(tensors, self.bias),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 2 * output.numel() * math.prod(tensors[self.weight].shape[1:])


@dataclass(frozen=True)
class BatchNorm:
    """Normalisation per channel, by the batch's statistics or by running ones."""

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float
    batch_statistics: bool

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            None if self.batch_statistics else _maybe(tensors, self.mean),
            None if self.batch_statistics else _maybe(tensors, self.variance),
            _maybe(tensors, self.weight),
            _maybe(tensors, self.bias),
            self.batch_statistics,
            0.0,
            self.eps,
        )

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 4 * output.numel()


@dataclass(frozen=True)
class Activation:
    """An elementwise function out of `torch.nn.functional`, with its options."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        if self.kind in ("tanh", "sigmoid"):
            return getattr(torch, self.kind)(x)
        return getattr(F, self.kind)(x, **dict(self.options))

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return output.numel()


@dataclass(frozen=True)
class Pool2d:
    """Max, average or adaptive average pooling, with the options of its torch function."""

    kind: str
    options: tuple[tuple[str, Any], ...]

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return getattr(F, self.kind)(x, **dict(self.options))

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        size = dict(self.options).get("kernel_size", 1)
        return output.numel() * (math.prod(size) if isinstance(size, tuple) else size * size)


@dataclass(frozen=True)
class Reshape:
    """Any view that keeps the examples in front: `[N, *shape]`, one entry may be -1."""

    shape: tuple[int, ...]

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class Flatten:
    """Joins dimensions `start` to `end`; `start` is at least 1."""

    start: int
    end: int

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return x.flatten(self.start, self.end)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class Mean:
    """The mean over dimensions of each example."""

    dims: tuple[int, ...]
    keepdim: bool

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=self.keepdim)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return output.numel()


@dataclass(frozen=True)
class Add:
    """The sum of two values of one shape: a residual connection."""

    def forward(self, tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return output.numel()


@dataclass(frozen=True)
class Identity:
    """What passes its input on: `nn.Identity`, dropout in `eval()`."""

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        return x

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 0


Layer = (
    Linear | Conv2d | BatchNorm | Activation | Pool2d | Reshape | Flatten | Mean | Add | Identity
)


@dataclass(frozen=True)
class Node:
    """A layer in its place: the values it reads, -1 being the network's input."""

    layer: Layer
    inputs: tuple[int, ...]
    name: str = ""
    shape: tuple[int, ...] = ()
    """The output of one example."""
    flops: int = 0
    """Of one example, forward."""


@dataclass(frozen=True)
class Network:
    """A module's `forward` as layers in order; the last node's value is the prediction."""

    nodes: tuple[Node, ...]
    output: int

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        """The reference: what the layers compute, by torch."""
        values: dict[int, Tensor] = {-1: x}
        for i, node in enumerate(self.nodes):
            values[i] = node.layer.forward(tensors, *[values[j] for j in node.inputs])
        return values[self.output]

    def measured(self, tensors: Tensors, x: Tensor) -> Network:
        """The same network with shapes and FLOPs of each layer filled in from a pass over `x`."""
        values: dict[int, Tensor] = {-1: x}
        nodes: list[Node] = []
        for i, node in enumerate(self.nodes):
            arguments = [values[j] for j in node.inputs]
            layer = node.layer
            if isinstance(layer, Mean):
                layer = Mean(tuple(d % arguments[0].dim() for d in layer.dims), layer.keepdim)
                if 0 in layer.dims:
                    raise ValueError("a mean over examples")
            out = layer.forward(tensors, *arguments)
            values[i] = out
            flops = layer.flops(tensors, out) // max(1, x.shape[0])
            nodes.append(Node(layer, node.inputs, node.name, tuple(out.shape[1:]), flops))
        return Network(tuple(nodes), self.output)

    def examples_independent(self) -> bool:
        """Whether each example's output depends on that example alone."""
        return not any(
            isinstance(node.layer, BatchNorm) and node.layer.batch_statistics for node in self.nodes
        )


def _maybe(tensors: Tensors, name: str | None) -> Tensor | None:
    return None if name is None else tensors[name]
