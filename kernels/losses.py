"""The losses: value, derivative, and tangent of the derivative; what csrc/losses.h says.

Targets are rows: probabilities that sum to 1 under cross-entropy, and the means (over examples,
over columns, by the classes' weights) are in the weights of the examples.
"""

import triton
import triton.language as tl

from fastmeta.kernels import record as r
from fastmeta.kernels.activations import sigmoid, softplus

CROSS_ENTROPY = tl.constexpr(0)
MSE = tl.constexpr(1)
BCE = tl.constexpr(2)
HUBER = tl.constexpr(3)
SMOOTH_L1 = tl.constexpr(4)
L1 = tl.constexpr(5)

# Views: predictions and their targets [N, C], weights [N, 1], the predictions' own factors [N, C],
# a number to add to the loss [1, 1], and a factor of the derivative.
PREDICTION = tl.constexpr(0)
TARGET = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
FACTOR = tl.constexpr(3)
MISSING = tl.constexpr(4)
WORTH = tl.constexpr(5)
TANGENT = tl.constexpr(6)  # of the predictions
SOFTMAX = tl.constexpr(7)
VALUE = tl.constexpr(8)
OUT = tl.constexpr(9)  # the derivative by the predictions, or its tangent

# Numbers.
KNEE = tl.constexpr(0)
HEIGHT = tl.constexpr(1)


@triton.jit
def loss(buffer, op, numbers, task, BM: tl.constexpr, BN: tl.constexpr):
    """Value and derivative, or the derivative's tangent."""
    kind = tl.load(op + r.LOSS)
    rows = tl.load(op + r.ROWS).to(tl.int32)
    total = tl.zeros((BM,), buffer.dtype.element_ty)
    forward = tl.load(op + r.KIND) == r.LOSS_FORWARD
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        place, row, _ = r.view(buffer, op, task, WEIGHT)
        weight = tl.load(place + i * row, mask=i < rows, other=0.0)
        if kind == CROSS_ENTROPY:
            if forward:
                total += _cross_entropy(buffer, op, task, weight, i, rows, BN)
            else:
                _cross_entropy_tangent(buffer, op, task, weight, i, rows, BN)
        elif forward:
            total += _each(kind, buffer, op, numbers, task, weight, i, rows, BN)
        else:
            _each_tangent(kind, buffer, op, numbers, task, weight, i, rows, BN)
    if forward:
        missing, _, _ = r.view(buffer, op, task, MISSING)
        place, _, _ = r.view(buffer, op, task, VALUE)
        tl.store(place, tl.sum(total) + tl.load(missing))


@triton.jit
def _worth(buffer, op, task):
    place, _, _ = r.view(buffer, op, task, WORTH)
    return tl.load(place)


@triton.jit
def _cross_entropy(buffer, op, task, weight, i, rows, BN: tl.constexpr):
    cols = tl.load(op + r.COLS).to(tl.int32)
    most = tl.full(i.shape, float("-inf"), buffer.dtype.element_ty)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        z = r.tile(buffer, op, task, PREDICTION, i, j, inside)
        most = tl.maximum(most, tl.max(tl.where(inside, z, float("-inf")), axis=1))
    most = tl.where(i < rows, most, 0.0)
    sum = tl.zeros(i.shape, buffer.dtype.element_ty)
    along = tl.zeros(i.shape, buffer.dtype.element_ty)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        away = r.tile(buffer, op, task, PREDICTION, i, j, inside) - most[:, None]
        sum += tl.sum(tl.where(inside, tl.exp(away), 0.0), axis=1)
        y = r.tile(buffer, op, task, TARGET, i, j, inside)
        along += tl.sum(tl.where(inside, away * y, 0.0), axis=1)
    steep = weight * _worth(buffer, op, task)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        z = r.tile(buffer, op, task, PREDICTION, i, j, inside)
        softmax = tl.exp(z - most[:, None]) / sum[:, None]
        r.put(softmax, buffer, op, task, SOFTMAX, i, j, inside)
        y = r.tile(buffer, op, task, TARGET, i, j, inside)
        r.put((softmax - y) * steep[:, None], buffer, op, task, OUT, i, j, inside)
    return tl.where(i < rows, weight * (tl.log(tl.where(i < rows, sum, 1.0)) - along), 0.0)


@triton.jit
def _cross_entropy_tangent(buffer, op, task, weight, i, rows, BN: tl.constexpr):
    cols = tl.load(op + r.COLS).to(tl.int32)
    mean = tl.zeros(i.shape, buffer.dtype.element_ty)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        softmax = r.tile(buffer, op, task, SOFTMAX, i, j, inside)
        moved = r.tile(buffer, op, task, TANGENT, i, j, inside)
        mean += tl.sum(softmax * moved, axis=1)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        softmax = r.tile(buffer, op, task, SOFTMAX, i, j, inside)
        moved = r.tile(buffer, op, task, TANGENT, i, j, inside)
        d = weight[:, None] * softmax * (moved - mean[:, None])
        r.put(d, buffer, op, task, OUT, i, j, inside)


@triton.jit
def _single(kind, z, y, c, knee, height):
    """Of single numbers: value, first and second derivative by the prediction."""
    error = z - y
    size = tl.abs(error)
    value = size
    slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))  # no number stays none
    curve = 0.0 * error
    if kind == MSE:
        value = error * error
        slope = 2.0 * error
        curve = 0.0 * error + 2.0
    elif kind == BCE:
        s = sigmoid(z)
        value = c * softplus(z) - z * y
        slope = c * s - y
        curve = c * s * (1.0 - s)
    elif kind != L1:
        near = size < knee
        value = height * tl.where(near, 0.5 * error * error, knee * (size - 0.5 * knee))
        slope = height * tl.where(error > knee, knee, tl.where(error < -knee, -knee, error))
        curve = tl.where(near, height, 0.0)
    return value, slope, curve


@triton.jit
def _each(kind, buffer, op, numbers, task, weight, i, rows, BN: tl.constexpr):
    cols = tl.load(op + r.COLS).to(tl.int32)
    knee, height = r.number(numbers, KNEE, buffer), r.number(numbers, HEIGHT, buffer)
    steep = weight * _worth(buffer, op, task)
    total = tl.zeros(i.shape, buffer.dtype.element_ty)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        z = r.tile(buffer, op, task, PREDICTION, i, j, inside)
        y = r.tile(buffer, op, task, TARGET, i, j, inside)
        c = r.tile(buffer, op, task, FACTOR, i, j, inside)
        value, slope, _ = _single(kind, z, y, c, knee, height)
        total += tl.sum(tl.where(inside, value, 0.0), axis=1)
        r.put(slope * steep[:, None], buffer, op, task, OUT, i, j, inside)
    return total * weight


@triton.jit
def _each_tangent(kind, buffer, op, numbers, task, weight, i, rows, BN: tl.constexpr):
    cols = tl.load(op + r.COLS).to(tl.int32)
    knee, height = r.number(numbers, KNEE, buffer), r.number(numbers, HEIGHT, buffer)
    for start in range(0, cols, BN):
        j = start + tl.arange(0, BN)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        z = r.tile(buffer, op, task, PREDICTION, i, j, inside)
        y = r.tile(buffer, op, task, TARGET, i, j, inside)
        c = r.tile(buffer, op, task, FACTOR, i, j, inside)
        _, _, curve = _single(kind, z, y, c, knee, height)
        moved = r.tile(buffer, op, task, TANGENT, i, j, inside)
        d = weight[:, None] * curve * moved
        r.put(d, buffer, op, task, OUT, i, j, inside)
