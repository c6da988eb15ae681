"""Shapes: views, columns picked, and tensors made like others."""

from __future__ import annotations

import math
from typing import Any

from fastmeta.network.expressions.expression import (
    INPUT,
    Expression,
    constant,
    held,
    operate,
    variable,
)
from fastmeta.network.expressions.tracing import (
    EXAMPLES,
    Symbol,
    Untraceable,
    axes_of,
    checked,
    elementwise,
    symbols,
)
from fastmeta.network.expressions.vocabulary.registry import answers, index_key


@answers("size")
def _size(input: Symbol, dim: int | None = None) -> Any:
    return input.shape if dim is None else input.shape[dim]


@answers("dim")
def _dim(input: Symbol) -> int:
    return input.ndim


@answers("numel")
def _numel(input: Symbol) -> int:
    if EXAMPLES in input.axes:
        raise Untraceable("it computes with the number of examples")
    return math.prod(input.axes)


@answers("squeeze")
def _squeeze(input: Symbol, dim: int | None = None) -> Symbol:
    places = range(input.ndim) if dim is None else [dim % input.ndim]
    if any(input.axes[place] == EXAMPLES for place in places):
        input.trace.assumes_many = True
    axes = tuple(a for i, a in enumerate(input.axes) if i not in places or a != 1)
    return input.like(input.expression, axes, input.is_mean)


@answers("unsqueeze")
def unsqueeze(input: Symbol, dim: int) -> Symbol:
    """An axis of size one more."""
    place = dim % (input.ndim + 1)
    axes = (*input.axes[:place], 1, *input.axes[place:])
    return input.like(input.expression, axes, input.is_mean)


@answers("view", "reshape")
def _reshape(input: Symbol, *shape: Any) -> Symbol:
    given = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    sizes = [*axes_of(given)]
    wide = [axis for axis in input.axes if axis != 1]
    for axis in (size for size in sizes if size not in (1, -1)):
        if axis in wide:
            wide.remove(axis)
    if -1 in sizes and len(wide) <= 1:
        sizes[sizes.index(-1)] = wide[0] if wide else 1
    if [a for a in sizes if a != 1] != [a for a in input.axes if a != 1]:
        raise Untraceable(f"it views {[*input.axes]} as {[*given]}")
    return input.like(input.expression, checked(tuple(sizes)), input.is_mean)


@answers("view_as", "reshape_as")
def _reshape_as(input: Symbol, other: Symbol) -> Symbol:
    return _reshape(input, *other.shape)


@answers("flatten")
def _flatten(input: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    start, end = start_dim % input.ndim, end_dim % input.ndim
    wide = [axis for axis in input.axes[start : end + 1] if axis != 1]
    if len(wide) > 1:
        raise Untraceable("it flattens examples and columns together")
    axes = (*input.axes[:start], *(wide or [1]), *input.axes[end + 1 :])
    return input.like(input.expression, axes, input.is_mean)


@answers("expand")
def _expand(input: Symbol, *sizes: Any) -> Symbol:
    given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    shape = axes_of(given)
    axes: list[Any] = [1] * (len(shape) - input.ndim) + [*input.axes]
    for i, size in enumerate(shape):
        if size != -1 and axes[i] == 1:
            axes[i] = size
    return input.like(input.expression, checked(tuple(axes)), input.is_mean)


@answers("expand_as")
def _expand_as(input: Symbol, other: Symbol) -> Symbol:
    return _expand(input, *other.shape)


@answers("broadcast_tensors")
def _broadcast_tensors(*tensors: Any) -> tuple[Symbol, ...]:
    given = symbols(*tensors)
    total = given[0]
    for each in given[1:]:
        total = elementwise("add", total, each)
    return tuple(_expand(each, *total.shape) for each in given)


@answers("zeros_like")
def _zeros_like(input: Symbol, **_: Any) -> Symbol:
    return input.like(constant(0.0), input.axes)


@answers("ones_like")
def _ones_like(input: Symbol, **_: Any) -> Symbol:
    return input.like(constant(1.0), input.axes)


@answers("full_like")
def _full_like(input: Symbol, fill_value: float, **_: Any) -> Symbol:
    return input.like(constant(fill_value), input.axes)


@answers("getitem")
def _getitem(input: Symbol, index: Any) -> Symbol:
    parts = [*index] if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        place = parts.index(Ellipsis)
        missing = input.ndim - sum(part is not None for part in parts) + 1
        parts[place : place + 1] = [slice(None)] * missing
    given = sum(part is not None for part in parts)
    parts += [slice(None)] * (input.ndim - given)
    axes: list[Any] = []
    old = iter(input.axes)
    expression = input.expression
    for part in parts:
        if part is None:
            axes.append(1)
            continue
        axis = next(old)
        if part == slice(None):
            axes.append(axis)
        elif axis == EXAMPLES:
            raise Untraceable("it picks examples")
        elif type(part) is int:
            expression = _columns(expression, axis, part % axis, 1)
        elif isinstance(part, slice) and part.step in (None, 1):
            first, last, _ = part.indices(axis)
            expression = _columns(expression, axis, first, last - first)
            axes.append(last - first)
        else:
            raise Untraceable("it picks columns by an index that is neither an integer nor a slice")
    return input.like(expression, tuple(axes), input.is_mean)


def _columns(expression: Expression, axis: int, first: int, count: int) -> Expression:
    """Some columns of a value of `axis` columns, taken where it comes from."""
    if count < 1 or first < 0 or first + count > axis:
        raise Untraceable("it picks columns that are not there")
    if expression.columns == 1:
        return expression
    if expression.name == INPUT:
        name, *rest = expression.value
        if name == "index":
            return operate("add", variable(index_key(count), False, count), float(first))
        before = rest[-1] if name == "columns" else 0
        key = expression.value[1] if name == "columns" else expression.value
        return variable(("columns", key, before + first), expression.of_examples, count)
    arguments = [_columns(a, axis, first, count) for a in expression.arguments]
    if expression.name == "held":
        return held(arguments[0])
    if expression.name in ("sum_rows", "spread"):
        raise Untraceable("it picks columns of a sum")
    return operate(expression.name, *arguments)


@answers("select")
def _select(input: Symbol, dim: int, index: int) -> Symbol:
    return _getitem(input, (*[slice(None)] * (dim % input.ndim), index))


@answers("narrow")
def _narrow(input: Symbol, dim: int, start: int, length: int) -> Symbol:
    return _getitem(input, (*[slice(None)] * (dim % input.ndim), slice(start, start + length)))


@answers("split")
def _split(tensor: Symbol, split_size_or_sections: Any, dim: int = 0) -> tuple[Symbol, ...]:
    size = tensor.shape[dim]
    each = split_size_or_sections
    sizes = [min(each, size - i) for i in range(0, size, each)] if isinstance(each, int) else each
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(tensor, dim, s, n) for s, n in zip(starts, sizes, strict=True))


@answers("chunk")
def _chunk(input: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    return _split(input, -(-input.shape[dim] // chunks), dim)


@answers("unbind")
def _unbind(input: Symbol, dim: int = 0) -> tuple[Symbol, ...]:
    return tuple(_select(input, dim, i) for i in range(input.shape[dim]))
