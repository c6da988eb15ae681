"""Arithmetic, comparisons, and functions of single numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmeta.network.expressions.expression import held
from fastmeta.network.expressions.tracing import Symbol, elementwise
from fastmeta.network.expressions.vocabulary.registry import ANSWERS, answers

_same = lambda x, *args, **kwargs: x  # noqa: E731


def _of_table(operation: str, arguments: int) -> Callable[..., Any]:
    if arguments == 1:

        def unary(input: Any) -> Symbol:
            return elementwise(operation, input)

        return unary

    def binary(input: Any, other: Any) -> Symbol:
        return elementwise(operation, input, other)

    return binary


for _operation, _names in {
    "exp": ("exp",), "expm1": ("expm1",), "log": ("log",), "log1p": ("log1p",), "tanh": ("tanh",),
    "sigmoid": ("sigmoid", "expit"), "sine": ("sin",), "cosine": ("cos",), "sqrt": ("sqrt",),
    "absolute": ("abs", "absolute"), "sign": ("sign", "sgn"), "erf": ("erf",),
    "negate": ("neg", "negative"),
}.items():  # fmt: skip
    for _name in _names:
        ANSWERS[_name] = _of_table(_operation, 1)
for _operation, _names in {
    "multiply": ("mul", "multiply"), "power": ("pow",), "maximum": ("maximum",),
    "minimum": ("minimum",), "less": ("lt", "less"), "less_equal": ("le", "less_equal"),
    "equal": ("eq",),
}.items():  # fmt: skip
    for _name in _names:
        ANSWERS[_name] = _of_table(_operation, 2)
for _name in ("contiguous", "clone", "float", "double", "type_as", "to", "pos", "positive"):
    ANSWERS[_name] = _same


@answers("add")
def _add(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    return elementwise("add", input, other if alpha == 1 else elementwise("multiply", alpha, other))


@answers("sub", "subtract")
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    other = other if alpha == 1 else elementwise("multiply", alpha, other)
    return elementwise("subtract", input, other)


@answers("div", "divide", "true_divide")
def _div(input: Any, other: Any) -> Symbol:
    return elementwise("divide", input, other)


@answers("gt", "greater")
def greater(input: Any, other: Any) -> Symbol:
    """The comparison a > b."""
    return elementwise("less", other, input)


@answers("ge", "greater_equal")
def _ge(input: Any, other: Any) -> Symbol:
    return elementwise("less_equal", other, input)


@answers("ne", "not_equal")
def _ne(input: Any, other: Any) -> Symbol:
    return 1 - elementwise("equal", input, other)


@answers("and", "bitwise_and", "logical_and")
def both(input: Any, other: Any) -> Symbol:
    """Conjunction of conditions."""
    return elementwise("multiply", _true(input), _true(other))


@answers("or", "bitwise_or", "logical_or")
def _or(input: Any, other: Any) -> Symbol:
    return elementwise("maximum", _true(input), _true(other))


@answers("invert", "bitwise_not", "logical_not")
def _invert(input: Any) -> Symbol:
    return 1 - _true(input)


def _true(condition: Any) -> Any:
    return _ne(condition, 0)


@answers("square")
def square(input: Any) -> Symbol:
    """The square."""
    return elementwise("power", input, 2)


@answers("reciprocal")
def _reciprocal(input: Any) -> Symbol:
    return elementwise("divide", 1.0, input)


@answers("rsqrt")
def _rsqrt(input: Any) -> Symbol:
    return _reciprocal(elementwise("sqrt", input))


@answers("sinh")
def _sinh(input: Any) -> Symbol:
    return 0.5 * (elementwise("exp", input) - elementwise("exp", -input))


@answers("cosh")
def _cosh(input: Any) -> Symbol:
    return 0.5 * (elementwise("exp", input) + elementwise("exp", -input))


@answers("detach")
def detach(input: Symbol) -> Symbol:
    """The same value, constant for derivatives."""
    return input.like(held(input.expression), input.axes, input.is_mean)


@answers("min")
def _min(input: Any, other: Any) -> Symbol:
    return elementwise("minimum", input, other)


@answers("max")
def _max(input: Any, other: Any) -> Symbol:
    return elementwise("maximum", input, other)


@answers("where")
def where(condition: Any, input: Any, other: Any) -> Symbol:
    """A value by condition, as torch takes derivatives: by branch."""
    return elementwise("select", condition, input, other)


@answers("masked_fill")
def _masked_fill(input: Any, mask: Any, value: Any) -> Symbol:
    return where(mask, value, input)


@answers("clamp", "clip")
def clamp(input: Any, min: Any = None, max: Any = None) -> Symbol:
    """A value within bounds."""
    # Not by maximum and minimum: at a bound torch's gradient is all the input's.
    if min is not None:
        input = (
            where(_ge(input, min), input, min)
            if _is_number(min)
            else elementwise("maximum", input, min)
        )
    if max is not None:
        input = (
            where(elementwise("less_equal", input, max), input, max)
            if _is_number(max)
            else elementwise("minimum", input, max)
        )
    return input


def _is_number(value: Any) -> bool:
    return not isinstance(value, Symbol) or value.expression.name == "constant"


@answers("clamp_min")
def _clamp_min(input: Any, min: Any) -> Symbol:
    return clamp(input, min)


@answers("clamp_max")
def _clamp_max(input: Any, max: Any) -> Symbol:
    return clamp(input, None, max)
