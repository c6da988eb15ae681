"""Batch norm of a layer's product: the four rules that csrc/batch_norm.h begins with.

Columns are independent: a block of them goes over all rows, once or twice for sums and once to
write. Where the statistics are given (`SHARE` is 0, not 1 / rows) they are constants, and no sum
reaches anything.
"""

import triton
import triton.language as tl

from fastmeta.kernels import record as r

# Views. Of the norm: the product, which forward leaves normalised, 1 / standard deviation, scale
# and shift, their cotangents and the rates of these.
N = tl.constexpr(0)
S = tl.constexpr(1)
MEAN = tl.constexpr(2)
G = tl.constexpr(3)
G_COTANGENT = tl.constexpr(4)
G_RATE = tl.constexpr(5)
B = tl.constexpr(6)
B_COTANGENT = tl.constexpr(7)
B_RATE = tl.constexpr(8)
# dz, and over the examples its sum and that of n dz.
DELTA = tl.constexpr(9)
PLAIN = tl.constexpr(10)
ALONG = tl.constexpr(11)
# n', and the sum of n u'.
TANGENT = tl.constexpr(12)
STRETCH = tl.constexpr(13)
# The tangent's input, and for dz' the sums again, tangents themselves.
IN = tl.constexpr(14)
IN_PLAIN = tl.constexpr(15)
IN_ALONG = tl.constexpr(16)
OUT = tl.constexpr(17)

# Numbers.
EPS = tl.constexpr(0)
SHARE = tl.constexpr(1)


@triton.jit
def norm(buffer, op, numbers, task, BM: tl.constexpr, BN: tl.constexpr):
    """One of the rules."""
    kind = tl.load(op + r.KIND)
    cols = tl.load(op + r.COLS).to(tl.int32)
    for block in range(tl.cdiv(cols, BN)):
        j = block * BN + tl.arange(0, BN)
        if kind == r.NORM_FORWARD:
            _forward(buffer, op, numbers, task, j, cols, BM)
        elif kind == r.NORM_BACKWARD:
            _backward(buffer, op, numbers, task, j, cols, BM)
        elif kind == r.NORM_TANGENT_FORWARD:
            _tangent_forward(buffer, op, numbers, task, j, cols, BM)
        else:
            _tangent_backward(buffer, op, numbers, task, j, cols, BM)


@triton.jit
def _statistics(buffer, op, numbers, task, j, cols, BM: tl.constexpr):
    """The mean, and then 1 / standard deviation about it, in a second pass."""
    rows = tl.load(op + r.ROWS).to(tl.int32)
    share = r.number(numbers, SHARE, buffer)
    sum = tl.zeros(j.shape, buffer.dtype.element_ty)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        sum += tl.sum(r.tile(buffer, op, task, N, i, j, inside), axis=0)
    mean = share * sum
    square = tl.zeros(j.shape, buffer.dtype.element_ty)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        away = r.tile(buffer, op, task, N, i, j, inside) - mean[None, :]
        square += tl.sum(tl.where(inside, away * away, 0.0), axis=0)
    inverse = 1.0 / tl.sqrt(share * square + r.number(numbers, EPS, buffer))
    return mean, inverse


@triton.jit
def _forward(buffer, op, numbers, task, j, cols, BM: tl.constexpr):
    rows = tl.load(op + r.ROWS).to(tl.int32)
    mean = r.row_of(buffer, op, task, MEAN, j, j < cols)
    inverse = r.row_of(buffer, op, task, S, j, j < cols)
    if r.number(numbers, SHARE, buffer) != 0:
        mean, inverse = _statistics(buffer, op, numbers, task, j, cols, BM)
        r.put_row(inverse, buffer, op, task, S, j, j < cols)
    scale = r.row_of(buffer, op, task, G, j, j < cols)
    shift = r.row_of(buffer, op, task, B, j, j < cols)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        n = (r.tile(buffer, op, task, N, i, j, inside) - mean[None, :]) * inverse[None, :]
        r.put(n, buffer, op, task, N, i, j, inside)
        r.put(scale[None, :] * n + shift[None, :], buffer, op, task, OUT, i, j, inside)


@triton.jit
def _sums(buffer, op, task, OF: tl.constexpr, j, cols, BM: tl.constexpr):
    """Over the examples, of a derivative and of n times it."""
    rows = tl.load(op + r.ROWS).to(tl.int32)
    plain = tl.zeros(j.shape, buffer.dtype.element_ty)
    along = tl.zeros(j.shape, buffer.dtype.element_ty)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        d = r.tile(buffer, op, task, OF, i, j, inside)
        plain += tl.sum(d, axis=0)
        along += tl.sum(r.tile(buffer, op, task, N, i, j, inside) * d, axis=0)
    return plain, along


@triton.jit
def _backward(buffer, op, numbers, task, j, cols, BM: tl.constexpr):
    rows = tl.load(op + r.ROWS).to(tl.int32)
    share = r.number(numbers, SHARE, buffer)
    plain, along = _sums(buffer, op, task, DELTA, j, cols, BM)
    r.put_row(plain, buffer, op, task, PLAIN, j, j < cols)
    r.put_row(along, buffer, op, task, ALONG, j, j < cols)
    inverse = r.row_of(buffer, op, task, S, j, j < cols)
    scale = r.row_of(buffer, op, task, G, j, j < cols)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        d = r.tile(buffer, op, task, DELTA, i, j, inside)
        n = r.tile(buffer, op, task, N, i, j, inside)
        centred = d - share * (plain[None, :] + n * along[None, :])
        r.put((scale * inverse)[None, :] * centred, buffer, op, task, OUT, i, j, inside)


@triton.jit
def _tangent_forward(buffer, op, numbers, task, j, cols, BM: tl.constexpr):
    rows = tl.load(op + r.ROWS).to(tl.int32)
    share = r.number(numbers, SHARE, buffer)
    plain, along = _sums(buffer, op, task, IN, j, cols, BM)
    r.put_row(along, buffer, op, task, STRETCH, j, j < cols)
    inverse = r.row_of(buffer, op, task, S, j, j < cols)
    scale = r.row_of(buffer, op, task, G, j, j < cols)
    of_scale = r.row_of(buffer, op, task, G_COTANGENT, j, j < cols)
    of_scale *= r.row_of(buffer, op, task, G_RATE, j, j < cols)
    of_shift = r.row_of(buffer, op, task, B_COTANGENT, j, j < cols)
    of_shift *= r.row_of(buffer, op, task, B_RATE, j, j < cols)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        n = r.tile(buffer, op, task, N, i, j, inside)
        u = r.tile(buffer, op, task, IN, i, j, inside)
        moved = inverse[None, :] * (u - share * (plain[None, :] + n * along[None, :]))
        z = of_scale[None, :] * n + scale[None, :] * moved + of_shift[None, :]
        r.put(moved, buffer, op, task, TANGENT, i, j, inside)
        r.put(z, buffer, op, task, OUT, i, j, inside)


@triton.jit
def _tangent_sums(buffer, op, task, j, cols, BM: tl.constexpr):
    """Over the examples, of dz' and of n dz' + n' dz."""
    rows = tl.load(op + r.ROWS).to(tl.int32)
    plain, along = _sums(buffer, op, task, IN, j, cols, BM)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        moved = r.tile(buffer, op, task, TANGENT, i, j, inside)
        along += tl.sum(moved * r.tile(buffer, op, task, DELTA, i, j, inside), axis=0)
    return plain, along


@triton.jit
def _tangent_backward(buffer, op, numbers, task, j, cols, BM: tl.constexpr):
    rows = tl.load(op + r.ROWS).to(tl.int32)
    share = r.number(numbers, SHARE, buffer)
    in_plain, in_along = _tangent_sums(buffer, op, task, j, cols, BM)
    r.put_row(in_plain, buffer, op, task, IN_PLAIN, j, j < cols)
    r.put_row(in_along, buffer, op, task, IN_ALONG, j, j < cols)
    inverse = r.row_of(buffer, op, task, S, j, j < cols)
    scale = r.row_of(buffer, op, task, G, j, j < cols)
    plain = share * r.row_of(buffer, op, task, PLAIN, j, j < cols)
    along = share * r.row_of(buffer, op, task, ALONG, j, j < cols)
    stretch = share * inverse * r.row_of(buffer, op, task, STRETCH, j, j < cols)
    of_scale = r.row_of(buffer, op, task, G_COTANGENT, j, j < cols)
    of_scale *= r.row_of(buffer, op, task, G_RATE, j, j < cols)
    of_scale -= scale * stretch
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        n = r.tile(buffer, op, task, N, i, j, inside)
        moved = r.tile(buffer, op, task, TANGENT, i, j, inside)
        centred = r.tile(buffer, op, task, DELTA, i, j, inside) - plain[None, :]
        centred -= n * along[None, :]
        turned = r.tile(buffer, op, task, IN, i, j, inside) - moved * along[None, :]
        turned -= share * (in_plain[None, :] + n * in_along[None, :])
        d = inverse[None, :] * (of_scale[None, :] * centred + scale[None, :] * turned)
        r.put(d, buffer, op, task, OUT, i, j, inside)
