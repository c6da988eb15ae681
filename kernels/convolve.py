"""Launches of the convolutions: images `[T, N, C, H, W]` with channels last in memory.

Weights are `[T, out, in / groups, kh, kw]`, or `[1, ...]` where the tasks share one. A pair is an
image and a weight, or the gradient of an output and an image; two pairs are added in one sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastmeta.kernels import geometry
from fastmeta.kernels.convolutions import convolve_kernel, weight_gradient_kernel
from fastmeta.kernels.geometry import Convolution
from fastmeta.kernels.launch import on_device
from fastmeta.kernels.tiles import Tile, fastest, of_convolution, of_weight_gradient
from fastmeta.precision import of_products

Pair = tuple[Tensor, Tensor]

PROGRAMS = 256
"""As many programs of a weight's gradient at least, if need be by dividing the pixels."""


def convolve(convolution: Convolution, pairs: Sequence[Pair], out: tuple[int, int]) -> Tensor:
    """The sum over one or two pairs `(x, w)` of convolutions, images of size `out`."""
    x, w = pairs[0]
    y = _images(x, w.shape[1], out)
    record = geometry.forward(convolution, x.shape[1], _size(x), out, _size(w), x.device)
    given = [(x, _by_group(w, convolution).permute(0, 1, 4, 5, 2, 3)) for x, w in pairs]
    _gather(y, given, record, (1, 1))
    return y


def with_statistics(
    convolution: Convolution, x: Tensor, w: Tensor, out: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """A convolution, and of blocks of so many of its pixels the mean and squares about it.

    **Returns:** `y`, `[T, blocks, 2, out]`, and how many pixels a block has; the last has fewer.
    """
    y = _images(x, w.shape[1], out)
    record = geometry.forward(convolution, x.shape[1], _size(x), out, _size(w), x.device)
    packed = _by_group(w, convolution).permute(0, 1, 4, 5, 2, 3)
    return y, *_gather(y, [(x, packed)], record, (1, 1), statistics=True)


def to_input(convolution: Convolution, pairs: Sequence[Pair], image: tuple[int, int]) -> Tensor:
    """The sum over one or two pairs `(dy, w)` of gradients by an input of size `image`."""
    dy, w = pairs[0]
    dx = _images(dy, w.shape[2] * convolution.groups, image)
    record = geometry.adjoint(convolution, dy.shape[1], image, _size(dy), _size(w), dy.device)
    given = [(dy, _by_group(w, convolution).permute(0, 1, 4, 5, 3, 2)) for dy, w in pairs]
    _gather(dx, given, record, convolution.stride)
    return dx


def to_weight(convolution: Convolution, pairs: Sequence[Pair], weight: tuple[int, ...]) -> Tensor:
    """The sum over one or two pairs `(dy, x)` of gradients by a weight, `[T, *weight]`."""
    dy, x = pairs[0]
    tasks, count, groups = x.shape[0], x.shape[1], convolution.groups
    outputs, inputs, *kernel = weight[0] // groups, *weight[1:]
    depth, pixels = math.prod(weight[1:]), count * dy.shape[3] * dy.shape[4]
    record = geometry.forward(convolution, count, _size(x), _size(dy), tuple(kernel), x.device)
    given = [(_dense(dy), _dense(x)) for dy, x in pairs]
    precision = of_products(x.dtype)

    def launch(tile: Tile) -> Tensor:
        grid = groups * _over(outputs, tile["BM"]) * _over(depth, tile["BN"]), tasks
        parts = min(_over(PROGRAMS, grid[0] * tasks), _over(pixels, 16 * tile["BK"]))
        part = _over(_over(pixels, parts), tile["BK"]) * tile["BK"]
        parts = _over(pixels, part)
        found = x.new_empty(parts, tasks, *weight)
        with on_device(x):
            weight_gradient_kernel[(*grid, parts)](
                found, *given[0], *given[-1], record, inputs, outputs, tasks, part,
                TWO=len(given) > 1, PRECISION=precision, **tile,
            )  # fmt: skip
        return found[0] if parts == 1 else found.sum(0)

    sizes = "weight", len(given), precision, groups, *weight, (pixels * tasks).bit_length()
    tiles = of_weight_gradient(inputs, outputs, x.dtype)
    return launch(fastest(tiles, sizes, launch, x.device))


def _gather(
    y: Tensor, pairs: Sequence[Pair], record: Tensor, classes: tuple[int, int],
    statistics: bool = False,
) -> tuple[Tensor, int]:  # fmt: skip
    """`y` by the kernel, from images and weights `[T or 1, groups, kh, kw, out, in]`.

    **Returns:** where they are asked for, statistics of blocks `[T, blocks, 2, C]`; and the pixels
    of a block.
    """
    given = [(_dense(x), w.contiguous()) for x, w in pairs]
    (x, w), (x2, w2) = given[0], given[-1]
    (tasks, count, channels, height, width), (groups, _, _, outputs, inputs) = y.shape, w.shape[1:]
    pixels = count * _over(height, classes[0]) * _over(width, classes[1])
    precision = of_products(y.dtype)

    def launch(tile: Tile) -> Tensor:
        blocks = _over(pixels, tile["BM"])
        partial = y.new_empty(tasks, blocks, 2, channels) if statistics else y
        with on_device(y):
            convolve_kernel[
                blocks * groups * _over(outputs, tile["BN"]), tasks, classes[0] * classes[1]
            ](
                y, x, w, x2, w2, partial, record, inputs, outputs,
                *(0 if len(each) == 1 else each[0].numel() for each in (w, w2)),
                TWO=len(given) > 1, STATISTICS=statistics, PRECISION=precision, **tile,
            )  # fmt: skip
        return partial

    sizes = (
        "convolution", len(given), statistics, precision, classes, *w.shape[1:],
        (pixels * tasks).bit_length(),
    )  # fmt: skip
    tile = fastest(of_convolution(inputs, outputs, y.dtype), sizes, launch, y.device)
    return launch(tile), tile["BM"]


def _images(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Fresh images `[T, N, channels, *size]`, channels last."""
    tasks, count = like.shape[:2]
    return like.new_empty(tasks, count, *size, channels).movedim(-1, 2)


def _by_group(w: Tensor, convolution: Convolution) -> Tensor:
    """`[T, groups, out, in, kh, kw]`."""
    return w.unflatten(1, (convolution.groups, -1))


def _size(images: Tensor) -> tuple[int, int]:
    """Height and width."""
    return images.shape[-2], images.shape[-1]


def _dense(x: Tensor) -> Tensor:
    """The numbers of `[T, N, C, H, W]` with channels last and nothing between; a view if so."""
    return x.movedim(2, -1).contiguous()


def _over(count: int, size: int) -> int:
    """How many pieces of `size` cover `count`."""
    return -(-count // size)
