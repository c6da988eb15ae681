"""Arithmetic, comparisons, and functions of single numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.expressions.expression import Expression, held
from fastmeta.network.expressions.tracing import Symbol, Untraceable, elementwise
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
    "negate": ("neg", "negative"), "log_gamma": ("lgamma", "special_gammaln"),
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
for _name in ("contiguous", "pos", "positive"):
    ANSWERS[_name] = _same


@answers("clone")
def _clone(input: Symbol, **_: Any) -> Symbol:
    return input.like(input.expression, input.axes, input.is_mean)


@answers("to", "type_as")
def _to(input: Symbol, *args: Any, **kwargs: Any) -> Symbol:
    for each in (*args, *kwargs.values()):
        dtype = each if isinstance(each, torch.dtype) else getattr(each, "dtype", None)
        if dtype is not None and dtype != input.trace.dtype:
            raise Untraceable(f"it casts to {dtype}")
    return input.like(input.expression, input.axes, input.is_mean)


@answers("float")
def _float(input: Symbol) -> Symbol:
    return _to(input, torch.float32)


@answers("double")
def _double(input: Symbol) -> Symbol:
    return _to(input, torch.float64)


@answers("add")
def _add(input: Any, other: Any, *, alpha: float = 1) -> Symbol:
    if is_truth(input) and is_truth(other):
        raise Untraceable("it adds conditions, which torch joins by or")
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
def not_equal(input: Any, other: Any) -> Symbol:
    """The comparison a != b."""
    return 1 - elementwise("equal", input, other)


def is_truth(value: Any) -> bool:
    """Return whether a symbol is of conditions, which torch has as bools."""
    return isinstance(value, Symbol) and _is_truth(value.expression)


def _is_truth(expression: Expression) -> bool:
    parts = expression.arguments
    if expression.name == "subtract":
        return parts[0].number == 1 and _is_truth(parts[1])
    if expression.name in ("multiply", "maximum"):
        return all(map(_is_truth, parts))
    return expression.name in ("less", "less_equal", "equal")


def _of_truths(name: str, *conditions: Any) -> Symbol:
    if not all(map(is_truth, conditions)):
        raise Untraceable("it combines the bits of numbers")
    return elementwise(name, *conditions)


@answers("and", "bitwise_and")
def both(input: Any, other: Any) -> Symbol:
    """Conjunction of conditions."""
    return _of_truths("multiply", input, other)


@answers("or", "bitwise_or")
def _or(input: Any, other: Any) -> Symbol:
    return _of_truths("maximum", input, other)


@answers("invert", "bitwise_not")
def _invert(input: Any) -> Symbol:
    if not is_truth(input):
        raise Untraceable("it combines the bits of numbers")
    return 1 - input


@answers("logical_and")
def _logical_and(input: Any, other: Any) -> Symbol:
    return both(not_equal(input, 0), not_equal(other, 0))


@answers("logical_or")
def _logical_or(input: Any, other: Any) -> Symbol:
    return _or(not_equal(input, 0), not_equal(other, 0))


@answers("logical_not")
def _logical_not(input: Any) -> Symbol:
    return elementwise("equal", input, 0)


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


@answers("where")
def where(condition: Any, input: Any, other: Any) -> Symbol:
    """A value by condition, as torch takes derivatives: by branch."""
    return elementwise("select", condition, input, other)


@answers("xlogy")
def _xlogy(input: Any, other: Any) -> Symbol:
    # At input 0 the derivative is log(other), as torch's, where that is finite.
    undefined = both(elementwise("equal", input, 0.0), elementwise("less_equal", other, 0.0))
    return input * where(undefined, 0.0, elementwise("log", other))


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
    return not isinstance(value, (Symbol, Tensor)) or getattr(value, "is_number", False)


@answers("clamp_min")
def _clamp_min(input: Any, min: Any) -> Symbol:
    return clamp(input, min)


@answers("clamp_max")
def _clamp_max(input: Any, max: Any) -> Symbol:
    return clamp(input, None, max)
