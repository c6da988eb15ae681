"""A network as a chain of convolutional blocks, and a loss, in the terms of the CPU's kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastmeta.executors.kernel_loss import Declined, KernelLoss, kernel_loss
from fastmeta.plan.layers import (
    Activation,
    BatchNorm,
    Conv2d,
    Flatten,
    Identity,
    Linear,
    Mean,
    Node,
    Pool2d,
    Reshape,
)
from fastmeta.plan.losses import Loss

Pair = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """A convolution with what follows it: norm, activation, maximum pooling, spatial mean.

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
    """The activation's slope up to zero; None where there is no activation."""
    window: Pair = (1, 1)
    mean: bool = False

    def tensors(self) -> tuple[str | None, ...]:
        """The names of weight, bias, scale and shift, as the kernels order them."""
        norm = self.norm
        return (self.weight, self.bias, norm and norm.weight, norm and norm.bias)

    @property
    def pixels(self) -> int:
        """Of the convolution's output."""
        sides = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                self.image[1:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return math.prod(sides)


@dataclass(frozen=True)
class Chain:
    """A network and a loss as the kernels take them."""

    blocks: tuple[Block, ...]
    loss: KernelLoss

    def names(self) -> tuple[str | None, ...]:
        """Weight, bias, scale and shift of each block."""
        return tuple(name for block in self.blocks for name in block.tensors())

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """The batch norm of each block."""
        return tuple(block.norm for block in self.blocks)


def chain(
    nodes: Sequence[Node],
    output: int,
    loss: Loss,
    image: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> Chain:
    """The network in the kernels' terms; **raises** `Declined`.

    `image` is the shape of an example, `shapes` those of the parameters by name.
    """
    in_terms = kernel_loss(loss)
    blocks: list[Block] = []
    shape = image
    flat: tuple[int, ...] | None = None  # what a row was flattened from
    for i, node in enumerate(nodes):
        if node.inputs != (i - 1,):
            raise Declined(f"{node.name} does not follow the layer before it")
        if isinstance(node.layer, (Conv2d, Linear)):
            blocks.append(_block(node, flat or shape, shapes))
        elif isinstance(node.layer, (Flatten, Reshape)):
            _check_flattens(node, shape)
            flat = flat or shape
            shape = node.shape
            continue
        elif not isinstance(node.layer, Identity):
            if not blocks or (flat is not None and shape != flat):
                raise Declined(f"{node.name} does not follow a convolution")
            blocks[-1] = _followed(blocks[-1], node, shape)
        flat, shape = None, node.shape
    if not any(isinstance(node.layer, Conv2d) for node in nodes):
        raise Declined("there is no convolution")
    if output != len(nodes) - 1 or not _is_row(blocks[-1], shape):
        raise Declined("its end is no linear layer, nor a mean over the image")
    names = [name for block in blocks for name in block.tensors() if name]
    if len(set(names)) != len(names):
        raise Declined("a parameter is used twice")
    return Chain(tuple(blocks), in_terms)


def _block(node: Node, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Block:
    layer = node.layer
    assert isinstance(layer, (Conv2d, Linear))
    if layer.weight not in shapes:
        raise Declined("a layer's weight is a buffer")
    if isinstance(layer, Linear):
        if len(node.shape) != 1:
            raise Declined(f"{node.name} gives {list(node.shape)} an example, not a row")
        channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
        image = (channels, height, width)
        return Block(layer.weight, layer.bias, image, node.shape[0], (height, width))
    if len(shape) != 3 or len(node.shape) != 3:
        raise Declined(f"{node.name} takes {list(shape)} an example, not an image")
    if layer.groups != 1:
        raise Declined(f"{node.name} has {layer.groups} groups")
    channels, height, width = shape
    filters, _, rows, cols = shapes[layer.weight]
    return Block(
        layer.weight, layer.bias, (channels, height, width), filters, (rows, cols), layer.stride,
        layer.padding, layer.dilation,
    )  # fmt: skip


def _followed(block: Block, node: Node, shape: tuple[int, ...]) -> Block:
    layer = node.layer
    if block.mean:
        raise Declined(f"{node.name} follows a mean over the image")
    pooled = block.window != (1, 1)
    if isinstance(layer, BatchNorm) and not (block.norm or pooled or block.below is not None):
        return replace(block, norm=layer)
    # Behind the maximum it is the same: no slope is negative.
    if isinstance(layer, Activation) and block.below is None:
        return replace(block, below=_slope_below(layer))
    if isinstance(layer, Pool2d) and layer.kind == "max_pool2d" and not pooled:
        return replace(block, window=_window(node))
    if _is_mean(node, shape):
        return replace(block, mean=True)
    raise Declined(f"{node.name} is a {type(layer).__name__} that the kernels can't take there")


def _slope_below(layer: Activation) -> float:
    options = dict(layer.options)
    if layer.kind == "relu":
        return 0.0
    slope = float(options.get("negative_slope", 0.01))
    if layer.kind != "leaky_relu" or slope < 0:
        raise Declined(f"{layer.kind} is no activation of the convolutional kernels")
    return slope


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
        raise Declined(f"{node.name} pools windows that overlap, are padded or have gaps")
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


def _check_flattens(node: Node, shape: tuple[int, ...]) -> None:
    if node.shape != shape and len(node.shape) != 1:
        raise Declined(f"{node.name} gives {list(node.shape)} an example, neither image nor row")


def _is_row(last: Block, shape: tuple[int, ...]) -> bool:
    return shape == (last.filters,) and (last.mean or last.pixels == 1)


def _pair(value: int | list[int] | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
