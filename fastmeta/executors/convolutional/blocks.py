"""A network as convolutional blocks, and a loss, in the terms of the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastmeta.executors.base import NotSupported, check_known
from fastmeta.executors.kernel_loss import KernelLoss, kernel_loss
from fastmeta.network import elementwise
from fastmeta.network.expressions.expression import Expression
from fastmeta.network.graph import (
    Activation,
    Add,
    BatchNorm,
    Conv2d,
    Elementwise,
    Flatten,
    Identity,
    Linear,
    Mean,
    Node,
    Pool2d,
    Reshape,
)
from fastmeta.network.losses.standard import Loss

Pair = tuple[int, int]
DATA = -1
"""In place of a block, where the network's input is read."""
ONE = (1, 1)
"""The window of no pooling."""
_RISING = frozenset(["tanh", "sigmoid"])
"""Monotone activations, whose maximum may be taken first; softplus drops at its threshold."""


@dataclass(frozen=True)
class Block:
    """A convolution with what follows it: norm, sum, activation, maximum pooling, spatial mean.

    A linear layer is a convolution whose kernel is as large as its input.
    """

    weight: str
    bias: str | None
    image: tuple[int, int, int]
    """Channels, height and width of the input."""
    filters: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    norm: BatchNorm | None = None
    below: float | None = None
    """A piecewise linear activation's slope up to zero; None where there is none."""
    expression: Expression | None = None
    """Any other activation."""
    rises: bool = False
    """True where the greatest value of the expression is that of its greatest argument."""
    window: Pair = ONE
    chooses: bool = False
    """True where the maximum is one of the expression's values, not of its arguments."""
    mean: bool = False
    source: int = DATA
    """The block whose output it reads."""
    plus: int | None = None
    """The block whose output it adds to its norm's, if any."""

    def tensors(self) -> tuple[str | None, ...]:
        """The names of weight, bias, scale and shift, as the kernels order them."""
        norm = self.norm
        return (self.weight, self.bias, norm and norm.weight, norm and norm.bias)

    @property
    def pixels(self) -> int:
        """The number of pixels of the convolution's output."""
        sides = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                self.image[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return math.prod(sides)

    @property
    def flops(self) -> int:
        """The FLOP of an example's convolution, two a multiply-add."""
        return 2 * self.pixels * self.filters * self.image[0] * math.prod(self.kernel)

    @property
    def is_linear(self) -> bool:
        """True where nothing stands behind its convolution and norm, so that a sum may."""
        followed = self.plus is not None or self.mean or self.is_active
        return not followed and self.window == ONE

    @property
    def is_active(self) -> bool:
        """True where it has an activation."""
        return self.below is not None or self.expression is not None


@dataclass(frozen=True)
class Blocks:
    """A network and the losses of support and query sets as the kernels take them: no block reads a
    later one, all but the last are read."""

    blocks: tuple[Block, ...]
    loss: KernelLoss
    query_loss: KernelLoss

    def names(self) -> tuple[str | None, ...]:
        """Weight, bias, scale and shift of each block."""
        return tuple(name for block in self.blocks for name in block.tensors())

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """The batch norm of each block."""
        return tuple(block.norm for block in self.blocks)


def blocks(
    nodes: Sequence[Node],
    output: int,
    losses: Sequence[Loss],
    image: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> Blocks:
    """The network in the kernels' terms; **raises** `NotSupported`.

    `losses` are those of support and query sets, `image` is the shape of an example, `shapes` those
    of the parameters by name.
    """
    loss, query_loss = map(kernel_loss, losses)
    if not any(isinstance(node.layer, Conv2d) for node in nodes):
        raise NotSupported("there is no convolution")
    check_known(nodes)
    reader = _Reader(nodes, output, image, shapes)
    found = reader.read()
    names = [name for block in found for name in block.tensors() if name]
    if len(set(names)) != len(names):
        raise NotSupported("a parameter is used twice")
    return Blocks(found, loss, query_loss)


@dataclass(frozen=True)
class _Value:
    """A layer's value: a block's output so far, maybe flattened."""

    block: int
    shape: tuple[int, ...]
    sole: bool
    """True where one layer alone reads it, which may then become a part of the block."""
    flat: tuple[int, ...] | None = None
    """The shape that a row was flattened from."""

    @property
    def reshaped(self) -> bool:
        return self.flat is not None and self.shape != self.flat


class _Reader:
    """One pass over the nodes."""

    def __init__(
        self,
        nodes: Sequence[Node],
        output: int,
        image: tuple[int, ...],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._nodes, self._output, self._shapes = nodes, output, shapes
        read = [source for node in nodes for source in node.inputs]
        self._sole = [read.count(i) == 1 for i in range(len(nodes))]
        self._blocks: list[Block] = []
        self._values = {-1: _Value(DATA, image, sole=False)}

    def read(self) -> tuple[Block, ...]:
        for i, node in enumerate(self._nodes):
            self._values[i] = self._value(i, node)
        end = self._values[self._output]
        last = self._blocks[end.block]
        if end.shape != (last.filters,) or not (last.mean or last.pixels == 1):
            raise NotSupported("its end is no linear layer, nor a mean over the image")
        return self._in_order(end.block)

    def _value(self, i: int, node: Node) -> _Value:
        sources = [self._values[source] for source in node.inputs]
        source, shape, sole = sources[0], node.shape, self._sole[i]
        if isinstance(node.layer, (Conv2d, Linear)):
            block = _block(node, source.flat or source.shape, self._shapes)
            self._blocks.append(replace(block, source=source.block))
            return _Value(len(self._blocks) - 1, shape, sole)
        if isinstance(node.layer, (Flatten, Reshape)):
            if shape != source.shape and len(shape) != 1:
                raise NotSupported(
                    f"{node.name} gives {list(shape)} an example, neither image nor row"
                )
            flat = source.flat or source.shape
            return _Value(source.block, shape, sole and source.sole, flat)
        if isinstance(node.layer, Identity):
            return replace(source, sole=sole and source.sole)
        if isinstance(node.layer, Add):
            return _Value(self._sum(node, *sources), shape, sole)
        if source.block == DATA or source.reshaped:
            raise NotSupported(f"{node.name} does not follow a convolution")
        if not source.sole:
            raise NotSupported(f"{node.name} changes what others read as it is")
        self._blocks[source.block] = _followed(self._blocks[source.block], node, source.shape)
        return _Value(source.block, shape, sole)

    def _sum(self, node: Node, left: _Value, right: _Value) -> int:
        """The one of two blocks that can take the other's output, which it then adds."""
        if DATA in (left.block, right.block) or left.reshaped or right.reshaped:
            raise NotSupported(f"{node.name} adds what is no convolution's output")
        for one, other in ((left, right), (right, left)):
            if one.sole and self._blocks[one.block].is_linear:
                block = replace(self._blocks[one.block], plus=other.block)
                self._blocks[one.block] = block
                return one.block
        raise NotSupported(
            f"{node.name} adds nothing that comes from a convolution or its norm alone"
        )

    def _in_order(self, last: int) -> tuple[Block, ...]:
        """The blocks, each behind those that it reads."""
        place: dict[int, int] = {}
        waiting = [last]
        while waiting:
            block = self._blocks[waiting[-1]]
            read = [i for i in (block.source, block.plus) if i not in (DATA, None, *place)]
            if read:
                waiting.append(read[0])
            else:
                place[waiting.pop()] = len(place)
        place[DATA] = DATA
        return tuple(
            replace(
                block, source=place[block.source],
                plus=None if block.plus is None else place[block.plus],
            )
            for block in (self._blocks[i] for i in place if i != DATA)
        )  # fmt: skip


def _block(node: Node, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Block:
    layer = node.layer
    assert isinstance(layer, (Conv2d, Linear))
    if layer.weight not in shapes:
        raise NotSupported("a layer's weight is a buffer")
    if isinstance(layer, Linear):
        if len(node.shape) != 1:
            raise NotSupported(f"{node.name} gives {list(node.shape)} an example, not a row")
        channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
        image = (channels, height, width)
        return Block(layer.weight, layer.bias, image, node.shape[0], (height, width))
    if len(shape) != 3 or len(node.shape) != 3:
        raise NotSupported(f"{node.name} takes {list(shape)} an example, not an image")
    if layer.groups != 1:
        raise NotSupported(f"{node.name} has {layer.groups} groups")
    channels, height, width = shape
    filters, _, rows, cols = shapes[layer.weight]
    return Block(
        layer.weight, layer.bias, (channels, height, width), filters, (rows, cols), layer.stride,
        layer.padding, layer.dilation,
    )  # fmt: skip


def _followed(block: Block, node: Node, shape: tuple[int, ...]) -> Block:
    layer = node.layer
    if block.mean:
        raise NotSupported(f"{node.name} follows a mean over the image")
    if isinstance(layer, BatchNorm) and not block.norm and block.is_linear:
        return replace(block, norm=layer)
    if isinstance(layer, (Activation, Elementwise)) and not block.is_active:
        below = _slope_below(layer)
        if below is not None:  # behind the maximum it is the same: no slope is negative
            return replace(block, below=below)
        if isinstance(layer, Elementwise):
            return replace(block, expression=layer.expression)
        return replace(block, expression=elementwise.expression(layer), rises=layer.kind in _RISING)
    if isinstance(layer, Pool2d) and layer.kind == "max_pool2d" and block.window == ONE:
        chooses = block.expression is not None and not block.rises
        return replace(block, window=_window(node), chooses=chooses)
    if _is_mean(node, shape):
        return replace(block, mean=True)
    kind = type(layer).__name__
    raise NotSupported(f"layer {node.name!r} ({kind}) stands where the compiled step can't take it")


def _slope_below(layer: Activation | Elementwise) -> float | None:
    """The slope up to zero of one that is piecewise linear and falls nowhere."""
    if not isinstance(layer, Activation) or layer.kind not in ("relu", "leaky_relu"):
        return None
    slope = dict(layer.options).get("negative_slope", 0.01) if layer.kind == "leaky_relu" else 0.0
    return float(slope) if slope >= 0 else None


def _window(node: Node) -> Pair:
    assert isinstance(node.layer, Pool2d)
    options = dict(node.layer.options)
    size = _pair(options["kernel_size"])
    stride = options.get("stride")
    plain = (
        _pair(options.get("padding", 0)) == (0, 0)
        and _pair(options.get("dilation", 1)) == (1, 1)
        and not options.get("ceil_mode", False)
    )
    if not plain or (stride not in (None, [], ()) and _pair(stride) != size):
        raise NotSupported(f"{node.name} pools windows that overlap, are padded or have gaps")
    return size


def _is_mean(node: Node, shape: tuple[int, ...]) -> bool:
    layer = node.layer
    if isinstance(layer, Mean):
        return len(shape) == 3 and sorted(layer.dims) == [2, 3]
    if not isinstance(layer, Pool2d) or layer.kind == "max_pool2d" or len(shape) != 3:
        return False
    if layer.kind == "adaptive_avg_pool2d":
        return math.prod(node.shape[1:]) == 1
    options = dict(layer.options)
    if options.get("divisor_override") or _pair(options.get("padding", 0)) != (0, 0):
        return False
    return _pair(options["kernel_size"]) == shape[1:]


def _pair(value: int | list[int] | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
