"""Batch norm, activation and maximum of a window, behind a convolution: each rule one pass.

Images are `[T, N, H, W, C]`, the windows' `[T, N, H // KH, W // KW, C]`; a program has BM pixels by
BC channels of one task (axis 1 of the grid). `f(z) = z` where z is positive and `SLOPE z`
elsewhere. `kept` is of each window the place of its maximum, times 2, plus 1 where that is
positive: with it all rules but the forward one are linear. Per task and channel, `[2, T, C]`,
`statistics` are m(x) and r, `moved` S(rx) and S(h rx), `sums` S(dz) and S(h dz): the formulas, and
what the letters mean, stand in fastmeta/layers/batch_norm.py.
"""

import triton
import triton.language as tl


@triton.jit
def row(numbers, stride, c, channels):
    """Numbers of this task's channels `c`, as `[1, BC]`."""
    at = numbers + tl.program_id(1).to(tl.int64) * stride + c
    return tl.load(at, mask=c < channels, other=0.0)[None, :]


@triton.jit
def pair(numbers, c, channels):
    """Both of `[2, T, C]`, as `row`."""
    second = numbers + tl.num_programs(1).to(tl.int64) * channels
    return row(numbers, channels, c, channels), row(second, channels, c, channels)


@triton.jit
def tile(count, channels, BM: tl.constexpr, BC: tl.constexpr):
    """This program's pixels `[BM]` of `count`, channels `[BC]`, and which are there."""
    across = tl.cdiv(channels, BC)
    m = (tl.program_id(0) // across).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    return m, c, (m < count)[:, None] & (c < channels)[None, :]


@triton.jit
def in_window(m, place, height, width, KH: tl.constexpr, KW: tl.constexpr):
    """The pixel at `place` of the windows `m`, counted through all tasks' images."""
    rows, columns = height // KH, width // KW
    i = m // columns % rows * KH
    j = m % columns * KW
    first = (m // (rows * columns) * height + i) * width + j
    return first + place // KW * width + place % KW


@triton.jit
def store_sums(sums, first, second, c, channels, BC: tl.constexpr):
    """Two sums over a program's pixels, into `[2, T, blocks, C]`."""
    across = tl.cdiv(channels, BC)
    blocks = tl.num_programs(0) // across
    block = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0) // across
    place = sums + block * channels + c
    tl.store(place, tl.sum(first, axis=0), mask=c < channels)
    place += tl.num_programs(1).to(tl.int64) * blocks * channels
    tl.store(place, tl.sum(second, axis=0), mask=c < channels)


@triton.jit(do_not_specialize=["blocks", "pixels", "rows"])
def statistics_kernel(
    statistics, partial, blocks, pixels, rows, channels,
    EPS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """m(x) and r from those of blocks of `rows` pixels: mean and squares about it (Chan 1979)."""
    task = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    partial += task * blocks * 2 * channels
    total = tl.zeros((BM, BC), partial.dtype.element_ty)
    for start in range(0, blocks, BM):
        b = start + tl.arange(0, BM)
        inside = (b < blocks)[:, None] & (c < channels)[None, :]
        at = partial + b[:, None] * (2 * channels) + c[None, :]
        size = tl.minimum(rows, pixels - b * rows)[:, None]
        total += size * tl.load(at, mask=inside, other=0.0)
    mean = tl.sum(total, axis=0) / pixels
    total = tl.zeros((BM, BC), partial.dtype.element_ty)
    for start in range(0, blocks, BM):
        b = start + tl.arange(0, BM)
        inside = (b < blocks)[:, None] & (c < channels)[None, :]
        at = partial + b[:, None] * (2 * channels) + c[None, :]
        size = tl.minimum(rows, pixels - b * rows)[:, None]
        away = tl.load(at, mask=inside, other=0.0) - mean[None, :]
        squares = tl.load(at + channels, mask=inside, other=0.0)
        total += tl.where(inside, squares + size * away * away, 0.0)
    variance = tl.sum(total, axis=0) / pixels
    place = statistics + task * channels + c
    tl.store(place, mean, mask=c < channels)
    place += tl.num_programs(1).to(tl.int64) * channels
    tl.store(place, 1.0 / tl.sqrt(variance + EPS), mask=c < channels)


@triton.jit(do_not_specialize=["weight_task", "bias_task", "count", "height", "width"])
def forward_kernel(
    y, kept, x, statistics, weight, bias, weight_task, bias_task, count, height, width, channels,
    KH: tl.constexpr, KW: tl.constexpr, SLOPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`y` and `kept`. The first of equal numbers is the maximum, and no number is, as in torch."""
    windows = count * (height // KH) * (width // KW)
    m, c, inside = tile(windows, channels, BM, BC)
    task = tl.program_id(1).to(tl.int64)
    x += task * count * height * width * channels
    mean, r = pair(statistics, c, channels)
    scale = r * row(weight, weight_task, c, channels)
    shift = row(bias, bias_task, c, channels)
    best = tl.full((BM, BC), float("-inf"), x.dtype.element_ty)
    place = tl.zeros((BM, BC), tl.int32)
    for k in tl.static_range(KH * KW):
        pixel = in_window(m, k, height, width, KH, KW)
        z = tl.load(x + pixel[:, None] * channels + c[None, :], mask=inside, other=0.0)
        z = (z - mean) * scale + shift
        a = z
        if SLOPE == 0.0:
            a = tl.where(z <= 0, 0.0, z)
        elif SLOPE != 1.0:
            a = tl.where(z <= 0, z * SLOPE, z)
        greater = (a > best) | (a != a)
        best = tl.where(greater, a, best)
        place = tl.where(greater, 2 * k, place)
    place += tl.where(best <= 0, 0, 1)
    at = (task * windows + m)[:, None] * channels + c[None, :]
    tl.store(y + at, best, mask=inside)
    tl.store(kept + at, place.to(tl.int8), mask=inside)


@triton.jit
def sloped(v, kept, SLOPE: tl.constexpr):
    """`f'(z) v`."""
    if SLOPE == 1.0:
        return v
    return tl.where(kept % 2 == 1, v, v * SLOPE)


@triton.jit
def tangent(rx, h, r, moved, pixels, c, channels):
    """`rh`."""
    plain, moment = pair(moved, c, channels)
    return r * (rx - (plain + h * moment) / pixels)


@triton.jit(do_not_specialize=["count", "height", "width"])
def sums_kernel(
    sums, dy, kept, x, statistics, rdy, rx, moved, count, height, width, channels,
    TANGENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SLOPE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """S(dz) and S(h dz), or their tangents S(rdz) and S(rh dz) + S(h rdz), in parts.

    Only the maxima of windows have a gradient: nothing else of x and rx is read.
    """
    windows, pixels = count * (height // KH) * (width // KW), count * height * width
    m, c, inside = tile(windows, channels, BM, BC)
    task = tl.program_id(1).to(tl.int64)
    at = (task * windows + m)[:, None] * channels + c[None, :]
    place = tl.load(kept + at, mask=inside, other=0).to(tl.int32)
    pixel = in_window(m[:, None], place // 2, height, width, KH, KW)
    of_x = (task * pixels + pixel) * channels + c[None, :]
    mean, r = pair(statistics, c, channels)
    h = (tl.load(x + of_x, mask=inside, other=0.0) - mean) * r
    dz = sloped(tl.load(dy + at, mask=inside, other=0.0), place, SLOPE)
    if TANGENT:
        rdz = sloped(tl.load(rdy + at, mask=inside, other=0.0), place, SLOPE)
        rh = tangent(tl.load(rx + of_x, mask=inside, other=0.0), h, r, moved, pixels, c, channels)
        store_sums(sums, rdz, rh * dz + h * rdz, c, channels, BC)
    else:
        store_sums(sums, dz, h * dz, c, channels, BC)


@triton.jit(do_not_specialize=["weight_task", "along_task", "count", "height", "width"])
def backward_kernel(
    dx, dy, kept, x, statistics, weight, sums, rdy, rx, moved, along, rsums,
    weight_task, along_task, count, height, width, channels,
    TANGENT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SLOPE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient by x, or its tangent, `along` being that of the weight."""
    pixels = count * height * width
    rows, columns = height // KH, width // KW
    m, c, inside = tile(pixels, channels, BM, BC)
    task = tl.program_id(1).to(tl.int64)
    of_x = (task * pixels + m)[:, None] * channels + c[None, :]
    i, j = m // width % height, m % width
    window = ((task * count + m // (height * width)) * rows + i // KH) * columns + j // KW
    at = window[:, None] * channels + c[None, :]
    # Rows and columns that fill no window have no gradient.
    filled = inside & (i < rows * KH)[:, None] & (j < columns * KW)[:, None]
    place = tl.load(kept + at, mask=filled, other=-1).to(tl.int32)
    mine = filled & (place // 2 == (i % KH * KW + j % KW)[:, None])
    mean, r = pair(statistics, c, channels)
    scale = r * row(weight, weight_task, c, channels)
    h = (tl.load(x + of_x, mask=inside, other=0.0) - mean) * r
    dz = sloped(tl.load(dy + at, mask=mine, other=0.0), place, SLOPE)
    plain, moment = pair(sums, c, channels)
    centred = dz - (plain + h * moment) / pixels
    if TANGENT:
        _, slant = pair(moved, c, channels)
        rh = tangent(tl.load(rx + of_x, mask=inside, other=0.0), h, r, moved, pixels, c, channels)
        rdz = sloped(tl.load(rdy + at, mask=mine, other=0.0), place, SLOPE)
        turn = r * (row(along, along_task, c, channels) - slant * scale / pixels)
        rplain, rmoment = pair(rsums, c, channels)
        d = scale * (rdz - (rplain + h * rmoment + rh * moment) / pixels) + turn * centred
    else:
        d = scale * centred
    tl.store(dx + of_x, d, mask=inside)


@triton.jit(do_not_specialize=["count", "height", "width"])
def moved_kernel(
    sums, x, rx, statistics, count, height, width, channels, BM: tl.constexpr, BC: tl.constexpr
):
    """S(rx) and S(h rx), in parts."""
    pixels = count * height * width
    m, c, inside = tile(pixels, channels, BM, BC)
    at = (tl.program_id(1).to(tl.int64) * pixels + m)[:, None] * channels + c[None, :]
    moved = tl.load(rx + at, mask=inside, other=0.0)
    mean, r = pair(statistics, c, channels)
    h = (tl.load(x + at, mask=inside, other=0.0) - mean) * r
    store_sums(sums, moved, h * moved, c, channels, BC)


@triton.jit(
    do_not_specialize=["weight_task", "along_task", "shift_task", "count", "height", "width"]
)
def tangent_kernel(
    ry, kept, x, rx, statistics, moved, weight, along, shift,
    weight_task, along_task, shift_task, count, height, width, channels,
    KH: tl.constexpr, KW: tl.constexpr, SLOPE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The output's tangent; `along` and `shift` are those of weight and bias."""
    windows, pixels = count * (height // KH) * (width // KW), count * height * width
    m, c, inside = tile(windows, channels, BM, BC)
    task = tl.program_id(1).to(tl.int64)
    at = (task * windows + m)[:, None] * channels + c[None, :]
    place = tl.load(kept + at, mask=inside, other=0).to(tl.int32)
    pixel = in_window(m[:, None], place // 2, height, width, KH, KW)
    of_x = (task * pixels + pixel) * channels + c[None, :]
    mean, r = pair(statistics, c, channels)
    h = (tl.load(x + of_x, mask=inside, other=0.0) - mean) * r
    rh = tangent(tl.load(rx + of_x, mask=inside, other=0.0), h, r, moved, pixels, c, channels)
    rz = rh * row(weight, weight_task, c, channels) + h * row(along, along_task, c, channels)
    rz += row(shift, shift_task, c, channels)
    tl.store(ry + at, sloped(rz, place, SLOPE), mask=inside)
