"""Derivatives of expressions by other expressions: gradients, and tangents along a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastmeta.network.expressions.expression import (
    CONSTANT,
    INPUT,
    Expression,
    constant,
    in_order,
    operate,
    reduce,
    spread,
)
from fastmeta.network.expressions.operations import OPERATIONS

_CONSTANT = ("peak", "held")
"""Operations whose results derivatives take for constants."""


def gradients(of: Expression, by: Sequence[Expression]) -> list[Expression | None]:
    """The gradient of a number, or of each example's, by inputs; None by what it does not reach.

    Reverse mode. Each has its input's shape; of rows summed where the input has one for all.
    """
    order = in_order([of])
    reaches = _reaching(order, by)
    if id(of) not in reaches:
        return [None] * len(by)
    cotangents: dict[int, Expression] = {id(of): constant(1.0)}
    for node in reversed(order):
        cotangent = cotangents.get(id(node))
        if cotangent is None or node.name in (CONSTANT, INPUT):
            continue
        for place, argument in enumerate(node.arguments):
            if id(argument) not in reaches:
                continue
            part = _pulled(node, place, cotangent)
            if part is None:
                continue
            part = _summed(part, node, argument)
            known = cotangents.get(id(argument))
            cotangents[id(argument)] = part if known is None else known + part
    found = [cotangents.get(id(each)) for each in by]
    return [
        None if gradient is None else spread(gradient, each.of_examples, each.columns)
        for gradient, each in zip(found, by, strict=True)
    ]


def tangents(
    of: Sequence[Expression], along: Mapping[Expression, Expression]
) -> list[Expression | None]:
    """The derivatives along directions of inputs, each of its expression's shape. Forward mode."""
    found: dict[int, Expression] = {id(each): direction for each, direction in along.items()}
    for node in in_order(of):
        if id(node) in found or not node.arguments:
            continue
        total: Expression | None = None
        for place, argument in enumerate(node.arguments):
            direction = found.get(id(argument))
            if direction is None:
                continue
            part = _pushed(node, place, direction)
            if part is not None:
                total = part if total is None else total + part
        if total is not None:
            found[id(node)] = spread(total, node.of_examples, node.columns)
    return [found.get(id(each)) for each in of]


def jet(of: Expression, by: Expression) -> tuple[Expression, Expression, Expression]:
    """An elementwise function of one input, and its first and second derivatives.

    Both together, forward: of one input that takes the fewest operations.
    """
    found: dict[int, _Jet] = {id(by): (constant(1.0), None)}
    for node in in_order([of]):
        if id(node) not in found:
            found[id(node)] = _moved(node, [found[id(argument)] for argument in node.arguments])
    slope, curvature = (constant(0.0) if each is None else each for each in found[id(of)])
    return of, slope, curvature


_Jet = tuple[Expression | None, Expression | None]
"""The first and the second derivative; None for a zero."""


def _moved(node: Expression, moved: Sequence[_Jet]) -> _Jet:
    """Both derivatives of an operation's result, from those of its arguments."""
    if node.name in (CONSTANT, INPUT, *_CONSTANT) or all(m == (None, None) for m in moved):
        return None, None
    firsts, seconds = [m[0] for m in moved], [m[1] for m in moved]
    operation, arguments = OPERATIONS[node.name], node.arguments
    if node.name == "select":
        return _along(node, firsts), _along(node, seconds)
    if node.name == "multiply":
        a, b = arguments
        twice = _times(constant(2.0), _times(firsts[0], firsts[1]))
        ends = _plus(_times(seconds[0], b), _times(a, seconds[1]))
        return _plus(_times(firsts[0], b), _times(a, firsts[1])), _plus(twice, ends)
    if operation.second is not None:
        (slope,) = operation.derivatives
        assert slope is not None
        d = slope(node, *arguments)
        bent = _times(_times(operation.second(node, *arguments, d), firsts[0]), firsts[0])
        return _times(d, firsts[0]), _plus(bent, _times(d, seconds[0]))
    slopes = [None if s is None else s(node, *arguments) for s in operation.derivatives]
    slopes = [constant(s) if isinstance(s, float) else s for s in slopes]
    directions = {e: f for e, f in zip(arguments, firsts, strict=True) if f is not None}
    changes = tangents([s if s is not None else constant(0.0) for s in slopes], directions)
    second: Expression | None = None
    for first, last, slope, change in zip(firsts, seconds, slopes, changes, strict=True):
        second = _plus(second, _plus(_times(slope, last), _times(change, first)))
    return _along(node, firsts), second


def _times(a: Expression | None, b: Expression | None) -> Expression | None:
    return None if a is None or b is None else a * b


def _plus(a: Expression | None, b: Expression | None) -> Expression | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _along(node: Expression, directions: Sequence[Expression | None]) -> Expression | None:
    """The derivative of an operation along directions of its arguments; None for a zero."""
    total: Expression | None = None
    for place, direction in enumerate(directions):
        if direction is not None:
            total = _plus(total, _pushed(node, place, direction))
    return total


def _reaching(order: Sequence[Expression], by: Sequence[Expression]) -> set[int]:
    """The nodes that depend on inputs in a way that has derivatives."""
    reaches = {id(each) for each in by}
    for node in order:
        if node.name not in _CONSTANT and any(
            id(argument) in reaches for argument in node.arguments
        ):
            reaches.add(id(node))
    return reaches


def _pulled(node: Expression, place: int, cotangent: Expression) -> Expression | None:
    """The cotangent of an argument, before it is summed over what was broadcast."""
    if node.name == "select":  # by branch, so that what was not taken does not count
        condition, zero = node.arguments[0], constant(0.0)
        if place == 0:
            return None
        taken = (cotangent, zero) if place == 1 else (zero, cotangent)
        return operate("select", condition, *taken)
    if node.name == "max_columns":
        return cotangent * _share_of_most(node)
    if node.name in ("sum_columns", "sum_rows", "spread"):
        return cotangent
    slope = OPERATIONS[node.name].derivatives[place]
    return None if slope is None else cotangent * slope(node, *node.arguments)


def _pushed(node: Expression, place: int, direction: Expression) -> Expression | None:
    """The part of a tangent that comes through one argument."""
    if node.name == "select":
        condition, zero = node.arguments[0], constant(0.0)
        if place == 0:
            return None
        taken = (direction, zero) if place == 1 else (zero, direction)
        return operate("select", condition, *taken)
    if node.name in _CONSTANT:
        return None
    if node.name == "max_columns":
        return reduce("sum_columns", direction * _share_of_most(node))
    if node.name in ("sum_columns", "sum_rows"):
        argument = node.arguments[0]
        return reduce(node.name, spread(direction, argument.of_examples, argument.columns))
    if node.name == "spread":
        return direction
    slope = OPERATIONS[node.name].derivatives[place]
    return None if slope is None else direction * slope(node, *node.arguments)


def _share_of_most(node: Expression) -> Expression:
    """1 where an entry is its row's largest, shared out among equals as torch.amax does."""
    largest = operate("equal", node.arguments[0], node)
    return largest / reduce("sum_columns", largest)


def _summed(part: Expression, node: Expression, argument: Expression) -> Expression:
    """A cotangent of the node's shape as one of the argument's."""
    of_examples = node.of_examples or argument.of_examples
    columns = max(node.columns, argument.columns)
    if argument.columns == 1 and columns > 1:
        part = reduce("sum_columns", spread(part, part.of_examples, columns))
    if of_examples and not argument.of_examples:
        part = reduce("sum_rows", spread(part, True, part.columns))
    return part
