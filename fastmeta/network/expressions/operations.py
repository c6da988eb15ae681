"""The one table of elementwise operations: by torch, in C++, and their derivatives.

csrc/operations.h is generated from it (`python -m fastmeta.network.expressions.generate`); a test
holds the two together. To add an operation, add an entry; an activation or a loss needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Derivative = Callable[..., Any]
"""`(result, *arguments) -> expression`; the derivative of the result by one argument."""


@dataclass(frozen=True)
class Operation:
    """An elementwise operation."""

    name: str
    compute: Callable[..., Tensor]
    """The operation by torch."""
    code: str
    """The operation in C++, of values `a`, `b` and `c`; S is their scalar type."""
    derivatives: tuple[Derivative | None, ...]
    """By each argument, in torch's convention at kinks; None where it is 0 everywhere."""
    second: Derivative | None = None
    """`(result, argument, first derivative) -> expression` of an operation of one argument."""

    @property
    def arguments(self) -> int:
        """The number of arguments."""
        return len(self.derivatives)


def _truth(compare: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A comparison that gives 1 or 0 of its arguments' type."""

    def compared(a: Tensor, b: Tensor) -> Tensor:
        return compare(a, b).to(torch.promote_types(a.dtype, b.dtype))

    return compared


def _select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition != 0, a, b)


def _wins(winner: str, a: Any, b: Any) -> Any:
    """1 where an argument is the result of maximum or minimum, 1/2 where both are."""
    tie = _apply("equal", a, b) * 0.5
    return (_apply("less", b, a) if winner == "maximum" else _apply("less", a, b)) + tie


def _apply(name: str, *arguments: Any) -> Any:
    return arguments[0].apply(name, *arguments)


def _unknown(y: Any, a: Any) -> Any:
    raise NotImplementedError("the third derivative of log_gamma")


_LIST = (
    Operation("add", torch.add, "a + b", (lambda y, a, b: 1.0, lambda y, a, b: 1.0)),
    Operation("subtract", torch.sub, "a - b", (lambda y, a, b: 1.0, lambda y, a, b: -1.0)),
    Operation("multiply", torch.mul, "a * b", (lambda y, a, b: b, lambda y, a, b: a)),
    # Both share 1 / b: division is the slowest of the simple operations.
    Operation(
        "divide", torch.div, "a / b", (lambda y, a, b: 1.0 / b, lambda y, a, b: -y * (1.0 / b))
    ),
    Operation(
        "power",
        torch.pow,
        "power_of_all<S>(a, b)",
        (
            # As torch: 0 where the exponent is 0, and by the exponent where the base is 0.
            lambda y, a, b: _apply(
                "select", _apply("equal", b, 0.0), 0.0, b * _apply("power", a, b - 1.0)
            ),
            lambda y, a, b: _apply(
                "select",
                _apply("equal", a, 0.0) * _apply("less_equal", b.constant(0.0), b),
                0.0,
                y * _apply("log", a),
            ),
        ),
    ),
    Operation(
        "maximum",
        torch.maximum,
        "select(b == b, maximum(a, b), b)",
        (
            lambda y, a, b: _wins("maximum", a, b),
            lambda y, a, b: _wins("maximum", b, a),
        ),
    ),
    Operation(
        "minimum",
        torch.minimum,
        "select(b == b, minimum(a, b), b)",
        (
            lambda y, a, b: _wins("minimum", a, b),
            lambda y, a, b: _wins("minimum", b, a),
        ),
    ),
    Operation("less", _truth(torch.lt), "select(a < b, Num{} + S(1), Num{})", (None, None)),
    Operation("less_equal", _truth(torch.le), "select(a <= b, Num{} + S(1), Num{})", (None, None)),
    Operation("equal", _truth(torch.eq), "select(a == b, Num{} + S(1), Num{})", (None, None)),
    Operation(
        "select",
        _select,
        "select(a != S(0), b, c)",
        (
            None,
            lambda y, a, b, c: _apply("select", a, a.constant(1.0), a.constant(0.0)),
            lambda y, a, b, c: _apply("select", a, a.constant(0.0), a.constant(1.0)),
        ),
    ),
    Operation("negate", torch.neg, "-a", (lambda y, a: -1.0,)),
    Operation("exp", torch.exp, "exp(a)", (lambda y, a: y,), lambda y, a, d: y),
    Operation(
        "expm1", torch.expm1, "expm1_of_all<S>(a)", (lambda y, a: y + 1.0,), lambda y, a, d: d
    ),
    Operation(
        "log", torch.log, "log_of_all<S>(a)", (lambda y, a: 1.0 / a,), lambda y, a, d: -(d * d)
    ),
    Operation("log1p", torch.log1p, "log1p_of_all<S>(a)", (lambda y, a: 1.0 / (1.0 + a),)),
    Operation(
        "tanh", torch.tanh, "tanh(a)", (lambda y, a: 1.0 - y * y,), lambda y, a, d: -2.0 * (y * d)
    ),
    Operation(
        "sigmoid",
        torch.sigmoid,
        "sigmoid(a)",
        (lambda y, a: y * (1.0 - y),),
        lambda y, a, d: d * (1.0 - 2.0 * y),
    ),
    Operation(
        "softplus",
        lambda a: torch.logaddexp(a, torch.zeros_like(a)),
        "softplus(a)",
        (lambda y, a: _apply("sigmoid", a),),
    ),
    Operation(  # of Mish: one exponential for both
        "tanh_softplus",
        lambda a: torch.tanh(torch.logaddexp(a, torch.zeros_like(a))),
        "tanh_softplus<S>(a)",
        (lambda y, a: (1.0 - y * y) * _apply("sigmoid", a),),
        lambda y, a, d: d * (1.0 - _apply("sigmoid", a) * (1.0 + 2.0 * y)),
    ),
    Operation("sine", torch.sin, "sin(a)", (lambda y, a: _apply("cosine", a),), lambda y, a, d: -y),
    Operation(
        "cosine", torch.cos, "cos(a)", (lambda y, a: -_apply("sine", a),), lambda y, a, d: -y
    ),
    Operation("sqrt", torch.sqrt, "sqrt(a)", (lambda y, a: 0.5 / y,)),
    Operation("absolute", torch.abs, "absolute(a)", (lambda y, a: _apply("sign", a),)),
    Operation(
        "sign",
        torch.sign,
        "select(a > S(0), Num{} + S(1), select(a < S(0), Num{} - S(1), Num{}))",
        (None,),
    ),
    Operation(
        "erf",
        torch.erf,
        "erf(a)",
        (lambda y, a: (2.0 / math.sqrt(math.pi)) * _apply("exp", -(a * a)),),
    ),
    Operation("log_gamma", torch.lgamma, "log_gamma<S>(a)", (lambda y, a: _apply("digamma", a),)),
    # These two are derivatives alone: no function that a user calls reaches the third.
    Operation("digamma", torch.digamma, "digamma<S>(a)", (lambda y, a: _apply("trigamma", a),)),
    Operation("trigamma", lambda a: torch.polygamma(1, a), "trigamma<S>(a)", (_unknown,)),
)

OPERATIONS = {operation.name: operation for operation in _LIST}
