"""Activations, by torch's formulas."""

from __future__ import annotations

import math
from typing import Any

from fastmeta.network.expressions.tracing import Symbol, elementwise
from fastmeta.network.expressions.vocabulary.arithmetic import both, clamp, detach, greater, where
from fastmeta.network.expressions.vocabulary.registry import answers


@answers("relu")
def _relu(input: Any, inplace: bool = False) -> Symbol:
    return where(elementwise("less_equal", input, 0.0), 0.0, input)  # of NaN it is NaN


@answers("leaky_relu")
def _leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Symbol:
    return where(greater(input, 0.0), input, input * negative_slope)


def _negative(input: Any) -> Symbol:
    """The input up to 0, so that no exponential of it is too large."""
    return where(greater(input, 0.0), 0.0, input)


@answers("elu")
def _elu(input: Any, alpha: Any = 1.0, inplace: bool = False) -> Symbol:
    negative = alpha * elementwise("expm1", _negative(input))
    return where(greater(input, 0.0), input, negative)


@answers("celu")
def _celu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Symbol:
    negative = alpha * elementwise("expm1", _negative(input) / alpha)
    return where(greater(input, 0.0), input, negative)


@answers("selu")
def _selu(input: Any, inplace: bool = False) -> Symbol:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return scale * _elu(input, alpha)


@answers("softplus")
def _softplus(input: Any, beta: Any = 1.0, threshold: float = 20.0) -> Symbol:
    t = input * beta
    return where(greater(t, threshold), input, elementwise("softplus", t) / beta)


@answers("silu")
def _silu(input: Any, inplace: bool = False) -> Symbol:
    return input * elementwise("sigmoid", input)


@answers("mish")
def _mish(input: Any, inplace: bool = False) -> Symbol:
    return input * elementwise("tanh", elementwise("softplus", input))


@answers("gelu")
def _gelu(input: Any, approximate: str = "none") -> Symbol:
    if approximate == "none":
        return input * (0.5 * (1.0 + elementwise("erf", input * math.sqrt(0.5))))
    inner = math.sqrt(2 / math.pi) * (input + 0.044715 * (input * input * input))
    return 0.5 * input * (1.0 + elementwise("tanh", inner))


@answers("logsigmoid", "log_sigmoid")
def _logsigmoid(input: Any) -> Symbol:
    return -elementwise("softplus", -input)


@answers("hardtanh")
def _hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Symbol:
    # Unlike clamp's, its slope at a bound is 0.
    inside = both(greater(input, min_val), elementwise("less", input, max_val))
    return where(inside, input, held_clamp(input, min_val, max_val))


def held_clamp(input: Symbol, low: float, high: float) -> Symbol:
    """A clamped value without a derivative."""
    return detach(clamp(input, low, high))


@answers("relu6")
def _relu6(input: Any, inplace: bool = False) -> Symbol:
    return _hardtanh(input, 0.0, 6.0)


@answers("hardsigmoid")
def _hardsigmoid(input: Any, inplace: bool = False) -> Symbol:
    return _hardtanh(input + 3.0, 0.0, 6.0) / 6.0


@answers("hardswish")
def _hardswish(input: Any, inplace: bool = False) -> Symbol:
    # As torch's backward has it: 0 up to -3, and 1 from 3 on.
    bent = where(elementwise("less", input, 3.0), input * (input + 3.0) / 6.0, input)
    return where(elementwise("less_equal", input, -3.0), 0.0, bent)


@answers("softsign")
def _softsign(input: Any) -> Symbol:
    return input / (1.0 + elementwise("absolute", input))


@answers("tanhshrink")
def _tanhshrink(input: Any) -> Symbol:
    return input - elementwise("tanh", input)
