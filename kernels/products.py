"""Products of matrices, and what is done to each sum: the rules of a dense layer.

Every operation is `sum = A B + A2 (B2 * scale)` over tiles, taken on by one of the endings below.
"""

import triton
import triton.language as tl

from fastmeta.kernels import record as r
from fastmeta.kernels.activations import derivatives, value
from fastmeta.kernels.precision import dot

# Views.
A = tl.constexpr(0)
B = tl.constexpr(1)
A2 = tl.constexpr(2)
B2 = tl.constexpr(3)
SCALE = tl.constexpr(4)
E1 = tl.constexpr(5)  # of the ending
E2 = tl.constexpr(6)
E3 = tl.constexpr(7)
E4 = tl.constexpr(8)
E5 = tl.constexpr(9)
OUT = tl.constexpr(10)
OUT2 = tl.constexpr(11)

# Numbers.
OPTION = tl.constexpr(0)  # of the activation
OPTION2 = tl.constexpr(1)
PROX = tl.constexpr(2)


@triton.jit
def product(
    buffer, op, numbers, task,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One operation, tile by tile."""
    kind = tl.load(op + r.KIND)
    rows = tl.load(op + r.ROWS).to(tl.int32)
    cols = tl.load(op + r.COLS).to(tl.int32)
    dtype = buffer.dtype.element_ty
    across = tl.cdiv(cols, BN)
    total = tl.sum(tl.zeros((BN,), dtype))
    for t in range(tl.cdiv(rows, BM) * across):
        i = t // across * BM + tl.arange(0, BM)
        j = t % across * BN + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        sum = tl.zeros((BM, BN), dtype)
        sum = _accumulate(sum, buffer, op, task, A, B, False, r.DEPTH, i, j, BK, PRECISION)
        sum = _accumulate(sum, buffer, op, task, A2, B2, True, r.DEPTH2, i, j, BK, PRECISION)
        if kind == r.RATE_SUM:
            total += tl.sum(_rate_gradient(sum, buffer, op, numbers, task, i, j, inside))
        else:
            _end(kind, sum, buffer, op, numbers, task, i, j, inside)
    if kind == r.RATE_SUM:
        start, _, _ = r.view(buffer, op, task, OUT)
        tl.store(start, total)


@triton.jit
def _accumulate(
    sum, buffer, op, task, LEFT: tl.constexpr, RIGHT: tl.constexpr, SCALED: tl.constexpr,
    LENGTH: tl.constexpr, i, j, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.load(op + r.ROWS), tl.load(op + r.COLS)
    depth = tl.load(op + LENGTH).to(tl.int32)
    a, a_row, a_col = r.view(buffer, op, task, LEFT)
    b, b_row, b_col = r.view(buffer, op, task, RIGHT)
    scale, scale_row, scale_col = r.view(buffer, op, task, SCALE)
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        of_left = (i < rows)[:, None] & (k < depth)[None, :]
        of_right = (k < depth)[:, None] & (j < cols)[None, :]
        left = tl.load(a + i[:, None] * a_row + k[None, :] * a_col, mask=of_left, other=0.0)
        right = tl.load(b + k[:, None] * b_row + j[None, :] * b_col, mask=of_right, other=0.0)
        if SCALED:
            at = scale + k[:, None] * scale_row + j[None, :] * scale_col
            right *= tl.load(at, mask=of_right, other=0.0)
        sum = dot(left, right, sum, PRECISION)
    return sum


@triton.jit
def _rate_gradient(sum, buffer, op, numbers, task, i, j, inside):
    """(3): p, its anchor and lambda are E1, E2 and E3."""
    p = r.tile(buffer, op, task, E1, i, j, inside)
    anchor = r.tile(buffer, op, task, E2, i, j, inside)
    cotangent = r.tile(buffer, op, task, E3, i, j, inside)
    return -(sum + r.number(numbers, PROX, buffer) * (p - anchor)) * cotangent


@triton.jit
def _end(kind, sum, buffer, op, numbers, task, i, j, inside):
    if kind == r.SET:
        r.put(sum, buffer, op, task, OUT, i, j, inside)
    elif kind == r.ADD:
        before = r.tile(buffer, op, task, OUT, i, j, inside)
        r.put(before + sum, buffer, op, task, OUT, i, j, inside)
    elif kind == r.DESCEND:
        _descend(sum, buffer, op, numbers, task, i, j, inside)
    elif kind == r.SUBTRACT:
        _subtract(sum, buffer, op, numbers, task, i, j, inside)
    elif kind == r.RATE_EACH:
        gradient = _rate_gradient(sum, buffer, op, numbers, task, i, j, inside)
        r.put(gradient, buffer, op, task, OUT, i, j, inside)
    else:
        _activate(kind, sum, buffer, op, numbers, task, i, j, inside)


@triton.jit
def _descend(sum, buffer, op, numbers, task, i, j, inside):
    """(1): p, its anchor and its rate are E1, E2 and E3."""
    p = r.tile(buffer, op, task, E1, i, j, inside)
    anchor = r.tile(buffer, op, task, E2, i, j, inside)
    rate = r.tile(buffer, op, task, E3, i, j, inside)
    moved = p - rate * (sum + r.number(numbers, PROX, buffer) * (p - anchor))
    r.put(moved, buffer, op, task, OUT, i, j, inside)


@triton.jit
def _subtract(sum, buffer, op, numbers, task, i, j, inside):
    """(4): lambda, its rate and what (5) adds are OUT, E3 and OUT2."""
    cotangent = r.tile(buffer, op, task, OUT, i, j, inside)
    prox = r.number(numbers, PROX, buffer)
    pulled = prox * r.tile(buffer, op, task, E3, i, j, inside) * cotangent
    r.put(cotangent - pulled - sum, buffer, op, task, OUT, i, j, inside)
    if prox != 0:
        anchor = r.tile(buffer, op, task, OUT2, i, j, inside)
        r.put(anchor + pulled, buffer, op, task, OUT2, i, j, inside)


@triton.jit
def _activate(kind, sum, buffer, op, numbers, task, i, j, inside):
    """Forward, and what goes through an activation backward, or as a tangent of either."""
    function = tl.load(op + r.FUNCTION)
    p, q = r.number(numbers, OPTION, buffer), r.number(numbers, OPTION2, buffer)
    first = r.tile(buffer, op, task, E1, i, j, inside)
    if kind == r.FORWARD:  # E1 the bias
        z = sum + first
        r.put(z, buffer, op, task, OUT, i, j, inside)
        r.put(value(function, z, p, q), buffer, op, task, OUT2, i, j, inside)
    else:  # E1 a row, E2 its rate, E3 z, E4 the tangent of z, E5 the derivative by the value
        d = sum + first * r.tile(buffer, op, task, E2, i, j, inside)
        slope, curve = derivatives(function, r.tile(buffer, op, task, E3, i, j, inside), p, q)
        bend = r.tile(buffer, op, task, E4, i, j, inside)
        bend *= curve * r.tile(buffer, op, task, E5, i, j, inside)
        r.put(d, buffer, op, task, OUT, i, j, inside)
        r.put(slope * d + bend, buffer, op, task, OUT2, i, j, inside)
