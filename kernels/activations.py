"""The activations: value, and first and second derivative, from the argument.

`kind` is that of csrc/network.h, known when the kernel runs; `p` and `q` are its options.
"""

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
TANH = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
ELU = tl.constexpr(5)
SOFTPLUS = tl.constexpr(6)
SILU = tl.constexpr(7)
GELU = tl.constexpr(8)
GELU_TANH = tl.constexpr(9)


@triton.jit
def expm1(x):
    """`exp(x) - 1` for x <= 0, to a few units in the last place (Kahan): no cancellation near 0."""
    u = tl.exp(x)
    # Far down, log(u) is -inf and the quotient no number; there -1 is right.
    usual = (u != 1.0) & (u > 1e-30)
    quotient = (u - 1.0) * x / tl.log(tl.where(usual, u, 0.5))
    return tl.where(usual, quotient, tl.where(u == 1.0, x, u - 1.0))


@triton.jit
def log1p(x):
    """`log(1 + x)` for x >= 0, likewise."""
    u = 1.0 + x
    usual = u != 1.0
    return tl.where(usual, tl.log(u) * x / tl.where(usual, u - 1.0, 1.0), x)


@triton.jit
def tanh(x):
    """The hyperbolic tangent: Triton has none that its interpreter knows."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`, with no overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """`log(1 + exp(x))`, with no overflow."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _normal(z):
    """The normal distribution function, and its density."""
    below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865475))
    return below, tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def _cubic(z):
    """`tanh u` of GELU's approximation, with the first and second derivative by z."""
    t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
    u1 = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    u2 = 0.7978845608028654 * 0.26829 * z
    t1 = (1.0 - t * t) * u1
    return t, t1, (1.0 - t * t) * u2 - 2.0 * t * t1 * u1


@triton.jit
def value(kind, z, p, q):
    """f(z)."""
    a = z
    if kind == RELU:
        a = tl.where(z <= 0, 0.0, z)  # no number stays none
    elif kind == LEAKY_RELU:
        a = tl.where(z > 0, z, z * p)
    elif kind == TANH:
        a = tanh(z)
    elif kind == SIGMOID:
        a = sigmoid(z)
    elif kind == ELU:
        a = tl.where(z > 0, z, p * expm1(tl.where(z > 0, 0.0, z)))
    elif kind == SOFTPLUS:
        a = tl.where(z * p > q, z, softplus(z * p) / p)
    elif kind == SILU:
        a = z * sigmoid(z)
    elif kind == GELU:
        below, _ = _normal(z)
        a = z * below
    elif kind == GELU_TANH:
        t, _, _ = _cubic(z)
        a = 0.5 * z * (1.0 + t)
    return a


@triton.jit
def derivatives(kind, z, p, q):
    """f'(z) and f''(z)."""
    slope = z * 0.0 + 1.0
    curve = z * 0.0
    if kind == RELU:
        slope = tl.where(z <= 0, 0.0, 1.0).to(z.dtype)
    elif kind == LEAKY_RELU:
        slope = tl.where(z > 0, 1.0, p).to(z.dtype)
    elif kind == TANH:
        t = tanh(z)
        slope = 1.0 - t * t
        curve = -2.0 * t * slope
    elif kind == SIGMOID:
        s = sigmoid(z)
        slope = s * (1.0 - s)
        curve = (1.0 - 2.0 * s) * slope
    elif kind == ELU:
        e = p * tl.exp(tl.where(z > 0, 0.0, z))
        slope = tl.where(z > 0, 1.0, e)
        curve = tl.where(z < 0, e, 0.0)  # at 0 as torch has it
    elif kind == SOFTPLUS:
        s = sigmoid(z * p)
        linear = z * p > q
        slope = tl.where(linear, 1.0, s)
        curve = tl.where(linear, 0.0, p * s * (1.0 - s))
    elif kind == SILU:
        s = sigmoid(z)
        d = s * (1.0 - s)
        slope = s + z * d
        curve = d * (2.0 + z * (1.0 - 2.0 * s))
    elif kind == GELU:
        below, density = _normal(z)
        slope = below + z * density
        curve = density * (2.0 - z * z)
    elif kind == GELU_TANH:
        t, t1, t2 = _cubic(z)
        slope = 0.5 * (1.0 + t + z * t1)
        curve = t1 + 0.5 * z * t2
    return slope, curve
