"""Convolutions of all tasks, each by its own weights: products of matrices that are never stored.

Images are `[T, N, H, W, C]`, weights `[T, groups, kh, kw, out, in]`, channels those of a group, or
one that all tasks share (a stride of 0 from task to task). Axis 1 of the grid is the task.
"""

import triton
import triton.language as tl

from fastmeta.kernels import geometry as g
from fastmeta.kernels.precision import dot


@triton.jit
def convolve_kernel(
    y, x, w, x2, w2, partial, geometry, inputs, outputs, w_task, w2_task,
    TWO: tl.constexpr, STATISTICS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = conv(x, w) + conv(x2, w2)`: BM pixels of one class by BN channels a program.

    `inputs` and `outputs` are channels of one group. Axis 2 of the grid is the class. With
    STATISTICS, `partial` `[T, blocks, 2, channels]` gets the mean of each program's pixels and the
    sum of squares about it.
    """
    groups = tl.load(geometry + g.GROUPS)
    task = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(outputs, BN)
    block, group = tl.program_id(0) // (across * groups), tl.program_id(0) // across % groups
    o = tl.program_id(0) % across * BN + tl.arange(0, BN)
    # The pixels of this class, numbered through.
    height, width = tl.load(geometry + g.OUT), tl.load(geometry + g.AXIS + g.OUT)
    down, down_columns = tl.load(geometry + g.DOWN), tl.load(geometry + g.AXIS + g.DOWN)
    a, b = tl.program_id(2) // down_columns, tl.program_id(2) % down_columns
    rows, columns = (height - a + down - 1) // down, (width - b + down_columns - 1) // down_columns
    count = tl.load(geometry + g.COUNT)
    m = block * BM + tl.arange(0, BM)
    image = m // tl.maximum(rows * columns, 1)
    row = a + m // tl.maximum(columns, 1) % tl.maximum(rows, 1) * down
    column = b + m % tl.maximum(columns, 1) * down_columns
    there = m < count * rows * columns
    sum = tl.zeros((BM, BN), y.dtype.element_ty)
    sum = _accumulate(
        sum, x, w + task * w_task, geometry, inputs, outputs, group, a, b, image, row, column,
        there, o, BK, PRECISION,
    )  # fmt: skip
    if TWO:
        sum = _accumulate(
            sum, x2, w2 + task * w2_task, geometry, inputs, outputs, group, a, b, image, row,
            column, there, o, BK, PRECISION,
        )  # fmt: skip
    channel = group * outputs + o
    pixel = (image.to(tl.int64) * height + row) * width + column
    place = y + (task * count * height * width + pixel[:, None]) * (groups * outputs)
    tl.store(place + channel[None, :], sum, mask=there[:, None] & (o < outputs)[None, :])
    if STATISTICS:
        mean = tl.sum(tl.where(there[:, None], sum, 0.0), axis=0)
        mean /= tl.minimum(BM, count * rows * columns - block * BM)
        away = tl.where(there[:, None], sum - mean[None, :], 0.0)
        blocks = tl.num_programs(0) // (across * groups)
        at = partial + (task * blocks + block) * (2 * groups * outputs) + channel
        tl.store(at, mean, mask=o < outputs)
        squares = tl.sum(away * away, axis=0)
        tl.store(at + groups * outputs, squares, mask=o < outputs)


@triton.jit
def _accumulate(
    sum, x, w, geometry, inputs, outputs, group, a, b, image, row, column, there, o,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the sum over taps and input channels; the channels of a tap lie side by side."""
    columns = geometry + g.AXIS
    first_row, tap_rows = g.taps(geometry, a)
    first_column, tap_columns = g.taps(columns, b)
    channels = inputs * tl.load(geometry + g.GROUPS)
    task = tl.program_id(1).to(tl.int64)
    size = tl.load(geometry + g.IN) * tl.load(columns + g.IN) * channels
    x += task * tl.load(geometry + g.COUNT) * size
    kernel_columns = tl.load(columns + g.KERNEL)
    w += group * tl.load(geometry + g.KERNEL) * kernel_columns * inputs * outputs
    i, j = g.origin(geometry, row, first_row), g.origin(columns, column, first_column)
    depth = tap_rows * tap_columns * inputs
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        channel, tap = k % inputs, k // inputs
        u, v = tap // tap_columns, tap % tap_columns
        inside = there[:, None] & (k < depth)[None, :]
        offset, inside = g.reads(
            geometry, image[:, None], i[:, None], j[:, None], u[None, :], v[None, :],
            (group * inputs + channel)[None, :], channels, inside,
        )  # fmt: skip
        left = tl.load(x + offset, mask=inside, other=0.0)
        r = first_row + u * tl.load(geometry + g.PERIOD)
        s = first_column + v * tl.load(columns + g.PERIOD)
        at = w + ((r * kernel_columns + s) * outputs * inputs + channel)[:, None]
        at += (o * inputs)[None, :]
        right = tl.load(at, mask=(k < depth)[:, None] & (o < outputs)[None, :], other=0.0)
        sum = dot(left, right, sum, PRECISION)
    return sum


@triton.jit(do_not_specialize=["tasks", "part"])
def weight_gradient_kernel(
    dw, dy, x, dy2, x2, geometry, inputs, outputs, tasks, part,
    TWO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weight's gradient from `dy` and `x`, plus that from `dy2` and `x2`.

    A program has BM output channels by BN of a filter's numbers, and `part` pixels (axis 2 of the
    grid): `dw` is `[parts, T, out, in, kh, kw]`, whose sum over parts is the caller's. No two
    programs add to one number, so every run gives the same bits.
    """
    groups = tl.load(geometry + g.GROUPS)
    columns = geometry + g.AXIS
    task, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kernel_columns = tl.load(columns + g.KERNEL)
    taps = tl.load(geometry + g.KERNEL) * kernel_columns
    depth = taps * inputs
    across, down = tl.cdiv(depth, BN), tl.cdiv(outputs, BM)
    group = tl.program_id(0) // (across * down)
    o = tl.program_id(0) // across % down * BM + tl.arange(0, BM)
    k = tl.program_id(0) % across * BN + tl.arange(0, BN)
    sum = tl.zeros((BM, BN), dw.dtype.element_ty)
    sum = _correlate(sum, dy, x, geometry, inputs, outputs, group, part, o, k, BK, PRECISION)
    if TWO:
        sum = _correlate(sum, dy2, x2, geometry, inputs, outputs, group, part, o, k, BK, PRECISION)
    place = dw + (share * tasks + task) * (groups * outputs * depth)
    place += (group * outputs + o)[:, None] * depth
    place += (k % inputs * taps + k // inputs)[None, :]
    tl.store(place, sum, mask=(o < outputs)[:, None] & (k < depth)[None, :])


@triton.jit
def _correlate(
    sum, dy, x, geometry, inputs, outputs, group, part, o, k,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the sum over this program's pixels."""
    columns = geometry + g.AXIS
    groups, count = tl.load(geometry + g.GROUPS), tl.load(geometry + g.COUNT)
    height, width = tl.load(geometry + g.OUT), tl.load(columns + g.OUT)
    task = tl.program_id(1).to(tl.int64)
    dy += task * count * height * width * (groups * outputs)
    x += task * count * tl.load(geometry + g.IN) * tl.load(columns + g.IN) * (groups * inputs)
    channel, tap = k % inputs, k // inputs
    kernel_columns = tl.load(columns + g.KERNEL)
    depth = tl.load(geometry + g.KERNEL) * kernel_columns * inputs
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, count * height * width)
    for start in range(first, last, BK):
        m = start + tl.arange(0, BK)
        at = dy + m.to(tl.int64)[:, None] * (groups * outputs) + (group * outputs + o)[None, :]
        left = tl.load(at, mask=(m < last)[:, None] & (o < outputs)[None, :], other=0.0)
        i = g.origin(geometry, m // width % height, 0)
        j = g.origin(columns, m % width, 0)
        offset, inside = g.reads(
            geometry, (m // (height * width))[:, None], i[:, None], j[:, None],
            (tap // kernel_columns)[None, :], (tap % kernel_columns)[None, :],
            (group * inputs + channel)[None, :], groups * inputs,
            (m < last)[:, None] & (k < depth)[None, :],
        )  # fmt: skip
        right = tl.load(x + offset, mask=inside, other=0.0)
        sum = dot(tl.trans(left), right, sum, PRECISION)
    return sum


INTERPRETED = not isinstance(convolve_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels: on the host, for tests."""
