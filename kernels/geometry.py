"""Where a convolution reads: one rule for the convolution, its adjoint and its weight's gradient.

Along an axis, output `o` reads at tap `r` the input at `(o * up + shift + r * dilation) / down`,
where that is whole and inside the image. A convolution has `up` = stride and `down` = 1; its
adjoint, from the output's gradient to the input's, has them the other way round. Outputs of one
class `o % down` read the same taps, every `period`-th from the first, and going from one of these
to the next moves the input by `step`: so none multiplies the zeros between pixels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of rows; those of columns stand AXIS further.
IN = tl.constexpr(0)
OUT = tl.constexpr(1)
KERNEL = tl.constexpr(2)
UP = tl.constexpr(3)
SHIFT = tl.constexpr(4)
DILATION = tl.constexpr(5)
DOWN = tl.constexpr(6)
PERIOD = tl.constexpr(7)
STEP = tl.constexpr(8)
AXIS = tl.constexpr(9)
# Of both.
COUNT = tl.constexpr(18)  # images of a task
GROUPS = tl.constexpr(19)


@dataclass(frozen=True)
class Convolution:
    """A convolution's own numbers, each pair of rows and columns."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@functools.cache  # and never thrown away: a recorded graph reads it
def forward(
    convolution: Convolution, count: int, image: tuple[int, int], out: tuple[int, int],
    kernel: tuple[int, int], device: torch.device,
) -> Tensor:  # fmt: skip
    """The record, int32, of `count` images a task, from `image` to `out` in size."""
    c = convolution
    record: list[int] = []
    for i in range(2):
        record += [image[i], out[i], kernel[i], c.stride[i], -c.padding[i], c.dilation[i]]
        record += [1, 1, c.dilation[i]]
    record += [count, c.groups]
    return torch.tensor(record, dtype=torch.int32, device=device)


@functools.cache  # and never thrown away: a recorded graph reads it
def adjoint(
    convolution: Convolution, count: int, image: tuple[int, int], out: tuple[int, int],
    kernel: tuple[int, int], device: torch.device,
) -> Tensor:  # fmt: skip
    """The same convolution, read from its output `out` to its input `image`."""
    c = convolution
    record: list[int] = []
    for i in range(2):
        stride, dilation = c.stride[i], c.dilation[i]
        period = stride // math.gcd(stride, dilation)
        record += [out[i], image[i], kernel[i], 1, c.padding[i], -dilation]
        record += [stride, period, -period * dilation // stride]
    record += [count, c.groups]
    return torch.tensor(record, dtype=torch.int32, device=device)


@triton.jit
def taps(geometry, residue):
    """Along the axis that `geometry` begins with: the class's first tap, and how many it has."""
    size, period = tl.load(geometry + KERNEL), tl.load(geometry + PERIOD)
    start = residue * tl.load(geometry + UP) + tl.load(geometry + SHIFT)
    dilation, down = tl.load(geometry + DILATION), tl.load(geometry + DOWN)
    first = size
    for r in range(tl.minimum(period, size)):
        if (start + r * dilation) % down == 0:
            first = r
    return first, (size - first + period - 1) // period


@triton.jit
def origin(geometry, out, first):
    """Along that axis: where outputs `out` of one class read at its first tap."""
    at = out * tl.load(geometry + UP) + tl.load(geometry + SHIFT)
    # Whole, but where the class has no tap, and then nothing is read.
    return (at + first * tl.load(geometry + DILATION)) // tl.load(geometry + DOWN)


@triton.jit
def reads(
    geometry, image, row, column, tap_rows, tap_columns, channel, channels, inside
):  # fmt: skip
    """Offsets of what pixels read at taps, behind the task's first number, and whether they do.

    `image`, `row` and `column` are the pixels' (origins), `tap_rows`, `tap_columns` and `channel`
    the taps' (counted within the class), in shapes that broadcast; `channels` of all groups.
    """
    height, width = tl.load(geometry + IN), tl.load(geometry + AXIS + IN)
    i = row + tap_rows * tl.load(geometry + STEP)
    j = column + tap_columns * tl.load(geometry + AXIS + STEP)
    inside = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    start = image.to(tl.int64) * height * width * channels
    return start + ((i * width + j) * channels + channel), inside
