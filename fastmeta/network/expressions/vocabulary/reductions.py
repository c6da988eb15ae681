"""Sums and means, largest columns, softmax."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from fastmeta.network.expressions.expression import operate, reduce, variable
from fastmeta.network.expressions.tracing import EXAMPLES, Axes, Symbol, Untraceable, elementwise
from fastmeta.network.expressions.vocabulary.arithmetic import not_equal, where
from fastmeta.network.expressions.vocabulary.registry import COUNT, answers, index_key
from fastmeta.network.expressions.vocabulary.shapes import unsqueeze


@answers("sum")
def summed(input: Symbol, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Symbol:
    """The sum over axes; over the examples, their mean times their number."""
    return _reduced(input, dim if axis is None else axis, keepdim, of_mean=False)


@answers("mean")
def averaged(input: Symbol, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Symbol:
    """The mean over axes."""
    return _reduced(input, dim if axis is None else axis, keepdim, of_mean=True)


def _reduced(input: Symbol, dim: Any, keepdim: bool, of_mean: bool) -> Symbol:
    places = _places(input, dim)
    expression, mean = input.expression, input.is_mean
    for place in places:
        axis = input.axes[place]
        if axis == EXAMPLES:
            mean = True
            if not of_mean:
                expression = operate("multiply", expression, variable(COUNT, False))
        elif axis != 1:
            if expression.columns > 1:
                expression = reduce("sum_columns", expression)
            elif not of_mean:
                expression = operate("multiply", expression, float(axis))
            if of_mean and input.expression.columns > 1:
                expression = operate("divide", expression, float(axis))
    return input.like(expression, _without(input.axes, places, keepdim), mean)


def _places(input: Symbol, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return [*range(input.ndim)]
    dims = [dim] if isinstance(dim, int) else [*dim]
    return sorted(d % max(1, input.ndim) for d in dims) if input.ndim else []


def _without(axes: Axes, places: list[int], keepdim: bool) -> Axes:
    if keepdim:
        return tuple(1 if i in places else axis for i, axis in enumerate(axes))
    return tuple(axis for i, axis in enumerate(axes) if i not in places)


def _over_columns(name: str, input: Symbol, dim: Any, keepdim: bool) -> Symbol:
    places = _places(input, dim)
    if input.is_mean or any(input.axes[place] == EXAMPLES for place in places):
        raise Untraceable(f"it takes {name} over examples")
    return input.like(reduce(name, input.expression), _without(input.axes, places, keepdim))


@answers("amax")
def _amax(input: Symbol, dim: Any = (), keepdim: bool = False) -> Symbol:
    return _over_columns("max_columns", input, dim, keepdim)


@answers("amin")
def _amin(input: Symbol, dim: Any = (), keepdim: bool = False) -> Symbol:
    return -_amax(-input, dim, keepdim)


class Largest(NamedTuple):
    """The result of a maximum or minimum along an axis, as torch has it."""

    values: Symbol
    indices: Symbol


@answers("max")
def _max(
    input: Any, other: Any = None, keepdim: bool = False, *, dim: int | None = None
) -> Symbol | Largest:
    if isinstance(other, (Symbol, Tensor)):
        return elementwise("maximum", input, other)
    return _largest(input, other if dim is None else dim, keepdim)


@answers("min")
def _min(
    input: Any, other: Any = None, keepdim: bool = False, *, dim: int | None = None
) -> Symbol | Largest:
    if isinstance(other, (Symbol, Tensor)):
        return elementwise("minimum", input, other)
    values, indices = _largest(-input, other if dim is None else dim, keepdim)
    return Largest(-values, indices)


@answers("argmax")
def _argmax(input: Symbol, dim: int | None = None, keepdim: bool = False) -> Symbol:
    return _largest(input, dim, keepdim).indices


@answers("argmin")
def _argmin(input: Symbol, dim: int | None = None, keepdim: bool = False) -> Symbol:
    return _largest(-input, dim, keepdim).indices


def _largest(input: Symbol, dim: int | None, keepdim: bool) -> Largest:
    """The largest of an example's columns and its place.

    Of equals it is the first, which alone has a derivative; a NaN is larger than any, as in torch.
    """
    if dim is None or input.ndim != 2:
        raise Untraceable("it takes max or min over all numbers, not along the columns")
    columns, peak = input.axes[1], _over_columns("peak", input, dim, True)
    numbers = input.like(variable(index_key(columns), False, columns), (1, columns))
    is_number = elementwise("equal", peak, peak)
    equal = where(is_number, elementwise("equal", input, peak), not_equal(input, input))
    index = -_over_columns("peak", where(equal, -numbers, -math.inf), dim, True)
    value = summed(where(elementwise("equal", numbers, index), input, 0.0), dim, True)
    axes = _without(input.axes, _places(input, dim), keepdim)
    return Largest(value.like(value.expression, axes), index.like(index.expression, axes))


def _shift(input: Symbol, dim: Any) -> Symbol:
    """The largest of an example's columns where it is finite, held constant."""
    largest = _over_columns("peak", input, dim, True)
    infinite = elementwise("equal", elementwise("absolute", largest), math.inf)
    return where(infinite, 0.0, largest)


@answers("logsumexp")
def logsumexp(input: Symbol, dim: Any, keepdim: bool = False) -> Symbol:
    """The logarithm of the sum of exponentials of an example's columns."""
    shift = _shift(input, dim)
    total = elementwise("log", summed(elementwise("exp", input - shift), dim, True)) + shift
    return (
        total
        if keepdim
        else total.like(total.expression, _without(input.axes, _places(input, dim), False))
    )


@answers("log_softmax")
def _log_softmax(input: Symbol, dim: Any = -1, _stacklevel: int = 3, dtype: Any = None) -> Symbol:
    return input - logsumexp(input, dim, True)


@answers("softmax")
def _softmax(input: Symbol, dim: Any = -1, _stacklevel: int = 3, dtype: Any = None) -> Symbol:
    powers = elementwise("exp", input - _shift(input, dim))
    return powers / summed(powers, dim, True)


@answers("gather")
def _gather(input: Symbol, dim: int, index: Symbol) -> Symbol:
    if dim % input.ndim != 1 or input.ndim != 2 or index.axes != (EXAMPLES, 1):
        raise Untraceable("it gathers what is not one column of each example")
    return summed(input * hot_rows(index, input.axes[1]), 1, True)


@answers("one_hot")
def _one_hot(tensor: Symbol, num_classes: int = -1) -> Symbol:
    if num_classes < 1 or tensor.axes != (EXAMPLES,):
        raise Untraceable("it calls one_hot without num_classes, or not of labels [N]")
    return hot_rows(unsqueeze(tensor, 1), num_classes)


def hot_rows(labels: Symbol, classes: int) -> Symbol:
    """Rows with a one in the column of each label."""
    numbers = labels.like(variable(index_key(classes), False, classes), (1, classes))
    return elementwise("equal", labels, numbers)
