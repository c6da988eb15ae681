"""Launches of the convolutions: images `[T, N, C, H, W]` with channels last in memory.

Weights are `[T, out, in / groups, kh, kw]`, or `[1, ...]` where the tasks share one. A pair is an
image and a weight, or the gradient of an output and an image; two pairs are added in one sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.kernels import geometry
from fastmeta.kernels.convolutions import convolve_kernel, weight_gradient_kernel
from fastmeta.kernels.geometry import Convolution
from fastmeta.kernels.launch import on_device, precision

Pair = tuple[Tensor, Tensor]

PROGRAMS = 256
"""As many programs of a weight's gradient at least, if need be by dividing the pixels."""


def tiles(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program's tile, by the channels of a group; none was measured.

    Where channels are not multiples of 16, numbers are loaded one by one, whose addresses would
    not all fit into the registers of a larger tile.
    """
    if dtype == torch.float64:
        return {"BM": 32, "BN": 32, "BK": 16}
    if inputs % 16 or outputs % 16:
        return {"BM": 32, "BN": 16 if outputs <= 16 else 32, "BK": 16}
    return {"BM": 64, "BN": 16 if outputs <= 16 else 32 if outputs <= 32 else 64, "BK": 32}


def weight_tiles(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of a weight's gradient: output channels, numbers of a filter, pixels."""
    vectors = dtype == torch.float32 and not inputs % 16 and not outputs % 16
    rows = 16 if dtype == torch.float64 else 32
    return {"BM": rows, "BN": 64 if vectors else 32, "BK": 16}


def convolve(
    convolution: Convolution, pairs: Sequence[Pair], bias: Tensor | None, out: tuple[int, int]
) -> Tensor:
    """The sum over one or two pairs `(x, w)` of convolutions, and `bias` `[T or 1, out]`."""
    x, w = pairs[0]
    y = _images(x, w.shape[1], out)
    record = geometry.forward(convolution, x.shape[1], _size(x), out, _size(w), x.device)
    given = [(x, _by_group(w, convolution).permute(0, 1, 4, 5, 2, 3)) for x, w in pairs]
    _gather(y, given, bias, None, record, (1, 1))
    return y


def with_statistics(
    convolution: Convolution, x: Tensor, w: Tensor, out: tuple[int, int]
) -> tuple[Tensor, Tensor, int]:
    """A convolution, and of blocks of so many of its pixels the mean and squares about it.

    **Returns:** `y`, `[T, blocks, 2, out]`, and how many pixels a block has; the last has fewer.
    """
    y = _images(x, w.shape[1], out)
    record = geometry.forward(convolution, x.shape[1], _size(x), out, _size(w), x.device)
    rows = tiles(w.shape[2], w.shape[1] // convolution.groups, x.dtype)["BM"]
    blocks = _over(x.shape[1] * out[0] * out[1], rows)
    partial = x.new_empty(len(x), blocks, 2, w.shape[1])
    packed = _by_group(w, convolution).permute(0, 1, 4, 5, 2, 3)
    _gather(y, [(x, packed)], None, partial, record, (1, 1))
    return y, partial, rows


def to_input(convolution: Convolution, pairs: Sequence[Pair], image: tuple[int, int]) -> Tensor:
    """The sum over one or two pairs `(dy, w)` of gradients by an input of size `image`."""
    dy, w = pairs[0]
    dx = _images(dy, w.shape[2] * convolution.groups, image)
    record = geometry.adjoint(convolution, dy.shape[1], image, _size(dy), _size(w), dy.device)
    given = [(dy, _by_group(w, convolution).permute(0, 1, 4, 5, 3, 2)) for dy, w in pairs]
    _gather(dx, given, None, None, record, convolution.stride)
    return dx


def to_weight(convolution: Convolution, pairs: Sequence[Pair], weight: tuple[int, ...]) -> Tensor:
    """The sum over one or two pairs `(dy, x)` of gradients by a weight, `[T, *weight]`."""
    dy, x = pairs[0]
    tasks, count, groups = x.shape[0], x.shape[1], convolution.groups
    outputs, depth = weight[0] // groups, weight[1] * weight[2] * weight[3]
    tile = weight_tiles(weight[1], outputs, x.dtype)
    grid = groups * _over(outputs, tile["BM"]) * _over(depth, tile["BN"]), tasks
    pixels = count * dy.shape[3] * dy.shape[4]
    parts = min(_over(PROGRAMS, grid[0] * tasks), _over(pixels, 16 * tile["BK"]))
    part = _over(_over(pixels, parts), tile["BK"]) * tile["BK"]
    parts = _over(pixels, part)
    found = x.new_empty(parts, tasks, *weight)
    kernel = (weight[2], weight[3])
    record = geometry.forward(convolution, count, _size(x), _size(dy), kernel, x.device)
    given = [(_dense(dy), _dense(x)) for dy, x in pairs]
    with on_device(x):
        weight_gradient_kernel[(*grid, parts)](
            found, *given[0], *given[-1], record, weight[1], outputs, tasks, part,
            TWO=len(given) > 1, PRECISION=precision(), **tile,
        )  # fmt: skip
    return found[0] if parts == 1 else found.sum(0)


def _gather(
    y: Tensor, pairs: Sequence[Pair], bias: Tensor | None, partial: Tensor | None, record: Tensor,
    classes: tuple[int, int],
) -> None:  # fmt: skip
    """`y` by the kernel, from images and weights `[T or 1, groups, kh, kw, out, in]`."""
    given = [(_dense(x), w.contiguous()) for x, w in pairs]
    (x, w), (x2, w2) = given[0], given[-1]
    (tasks, count, _, height, width), (groups, _, _, outputs, inputs) = y.shape, w.shape[1:]
    tile = tiles(inputs, outputs, y.dtype)
    pixels = count * _over(height, classes[0]) * _over(width, classes[1])
    blocks = _over(pixels, tile["BM"]) * groups * _over(outputs, tile["BN"])
    shift = w if bias is None else bias.contiguous()
    with on_device(y):
        convolve_kernel[blocks, tasks, classes[0] * classes[1]](
            y, x, w, x2, w2, shift, w if partial is None else partial, record, inputs, outputs,
            *(0 if len(each) == 1 else each[0].numel() for each in (w, w2, shift)),
            TWO=len(given) > 1, BIAS=bias is not None, STATISTICS=partial is not None,
            PRECISION=precision(), **tile,
        )  # fmt: skip


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
