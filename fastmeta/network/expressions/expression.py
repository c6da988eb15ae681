"""Expressions: graphs of operations on the entries, rows and columns of a set's matrices.

A set has N examples. An expression's value is a matrix of N rows, or of one that all examples
share, and of so many columns, or one: operations broadcast. Equal expressions are one object, so
that common parts are computed once. Beside the elementwise operations there are

    sum_columns, max_columns   over an example's columns          [N, C] -> [N, 1]
    peak                       max_columns, held constant by derivatives
    sum_rows                   over the examples                  [N, C] -> [1, C]
    spread                     to the shape of the expression
    held                       the same value, constant for derivatives
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.expressions.operations import OPERATIONS

CONSTANT, INPUT = "constant", "input"
REDUCTIONS = ("sum_columns", "max_columns", "peak", "sum_rows")


class Expression:
    """A value that is computed entry by entry; made by `constant`, `variable` and operators."""

    __slots__ = ("__weakref__", "arguments", "columns", "name", "of_examples", "value")

    name: str
    """The operation, `CONSTANT` or `INPUT`."""
    arguments: tuple[Expression, ...]
    value: Any
    """A constant's number, an input's key."""
    of_examples: bool
    """Whether each example has its own."""
    columns: int

    def apply(self, name: str, *arguments: Expression | float) -> Expression:
        """The result of an operation."""
        return operate(name, *arguments)

    def constant(self, value: float) -> Expression:
        """A constant, for the derivatives of operations."""
        return constant(value)

    def __add__(self, other: Expression | float) -> Expression:
        return operate("add", self, other)

    def __radd__(self, other: float) -> Expression:
        return operate("add", other, self)

    def __sub__(self, other: Expression | float) -> Expression:
        return operate("subtract", self, other)

    def __rsub__(self, other: float) -> Expression:
        return operate("subtract", other, self)

    def __mul__(self, other: Expression | float) -> Expression:
        return operate("multiply", self, other)

    def __rmul__(self, other: float) -> Expression:
        return operate("multiply", other, self)

    def __truediv__(self, other: Expression | float) -> Expression:
        return operate("divide", self, other)

    def __rtruediv__(self, other: float) -> Expression:
        return operate("divide", other, self)

    def __neg__(self) -> Expression:
        return operate("negate", self)

    def __str__(self) -> str:
        if self.name in (CONSTANT, INPUT):
            return str(self.value)
        return f"{self.name}({', '.join(map(str, self.arguments))})"

    @property
    def number(self) -> float | None:
        """The value of a constant; None of anything else."""
        return self.value if self.name == CONSTANT else None

    def __reduce__(self) -> Any:
        return _make, (self.name, self.arguments, self.value, self.of_examples, self.columns)


_made: weakref.WeakValueDictionary[Any, Expression] = weakref.WeakValueDictionary()


def _make(
    name: str, arguments: tuple[Expression, ...], value: Any, of_examples: bool, columns: int
) -> Expression:
    # A number's text tells 0.0 from -0.0, and its own NaN is equal to itself.
    shown = repr(value) if name == CONSTANT else value
    key = (name, tuple(map(id, arguments)), shown, of_examples, columns)
    found = _made.get(key)
    if found is None:
        found = Expression()
        found.name, found.arguments, found.value = name, arguments, value
        found.of_examples, found.columns = of_examples, columns
        found = _made.setdefault(key, found)
    return found


def constant(value: float) -> Expression:
    """A number."""
    return _make(CONSTANT, (), float(value), False, 1)


def variable(key: Any, of_examples: bool = True, columns: int = 1) -> Expression:
    """An input, known by a key."""
    return _make(INPUT, (), key, of_examples, columns)


def operate(name: str, *given: Expression | float) -> Expression:
    """An elementwise operation, simplified where its value stays exactly the same."""
    arguments = tuple(a if isinstance(a, Expression) else constant(a) for a in given)
    columns = max(argument.columns for argument in arguments)
    if any(argument.columns not in (1, columns) for argument in arguments):
        raise ValueError(f"{name}: of {[argument.columns for argument in arguments]} columns")
    simple = _simplified(name, arguments)
    if simple is not None:
        return simple
    of_examples = any(argument.of_examples for argument in arguments)
    return _make(name, arguments, None, of_examples, columns)


def reduce(name: str, argument: Expression) -> Expression:
    """One of `REDUCTIONS`."""
    if name == "sum_rows":
        if not argument.of_examples:
            raise ValueError("sum_rows: of what all examples share")
        return _make(name, (argument,), None, False, argument.columns)
    if argument.columns == 1:
        return argument
    return _make(name, (argument,), None, argument.of_examples, 1)


def spread(argument: Expression, of_examples: bool, columns: int) -> Expression:
    """The same value in so many columns, and for each example."""
    if (argument.of_examples, argument.columns) == (of_examples, columns):
        return argument
    return _make("spread", (argument,), None, of_examples, columns)


def held(argument: Expression) -> Expression:
    """The same value, which derivatives take for a constant."""
    return _make("held", (argument,), None, argument.of_examples, argument.columns)


def _simplified(name: str, arguments: tuple[Expression, ...]) -> Expression | None:
    numbers = [argument.number for argument in arguments]
    if all(number is not None for number in numbers):
        values = (torch.tensor(number, dtype=torch.float64) for number in numbers)
        return constant(float(OPERATIONS[name].compute(*values)))
    first, *others = arguments
    if name == "tanh" and first.name == "softplus":
        return operate("tanh_softplus", *first.arguments)
    if not others:
        return first.arguments[0] if name == "negate" and first.name == "negate" else None
    if name == "select":
        taken = others[0] if numbers[0] else others[1]
        known = numbers[0] is not None and _shape(arguments) == _shape(others)
        return spread(taken, *_shape(others)) if known else None
    return _simple_pair(name, first, others[0])


def _simple_pair(name: str, first: Expression, second: Expression) -> Expression | None:
    a, b = first.number, second.number
    if name in ("add", "subtract") and b == 0:
        return first
    if name in ("add", "subtract") and a == 0:
        return second if name == "add" else operate("negate", second)
    if name in ("add", "subtract") and second.name == "negate":
        other = "subtract" if name == "add" else "add"
        return operate(other, first, second.arguments[0])
    if name == "add" and first.name == "negate":
        return operate("subtract", second, first.arguments[0])
    if name == "multiply":
        return _product(first, second)
    if name == "divide" and b is not None and _is_power_of_two(b) and abs(b) < 1e30:
        return operate("multiply", first, 1.0 / b)
    if name == "power" and b is not None:
        return _power(first, b)
    return None


def _product(first: Expression, second: Expression) -> Expression | None:
    a, b = first.number, second.number
    if b is not None and a is None:
        return operate("multiply", second, first)
    if a == 1:
        return second
    if a == -1:
        return operate("negate", second)
    if a is not None and second.name == "multiply":
        inner = second.arguments[0].number
        # The product of two numbers is rounded once more: exact for powers of two alone.
        if inner is not None and (_is_power_of_two(a) or _is_power_of_two(inner)):
            return operate("multiply", a * inner, second.arguments[1])
    if a is not None and second.name == "negate":
        return operate("multiply", -a, second.arguments[0])
    return None


def _power(base: Expression, exponent: float) -> Expression | None:
    if exponent == 0:
        return spread(constant(1.0), *_shape((base,)))
    if exponent == 1:
        return base
    if exponent == 0.5:
        return operate("sqrt", base)
    if exponent in (2, 3, 4):
        square = operate("multiply", base, base)
        return (
            square
            if exponent == 2
            else operate("multiply", square, base if exponent == 3 else square)
        )
    if exponent == -1:
        return operate("divide", 1.0, base)
    return None


def _shape(arguments: Iterable[Expression]) -> tuple[bool, int]:
    given = [*arguments]
    return any(a.of_examples for a in given), max(a.columns for a in given)


def _is_power_of_two(value: float) -> bool:
    return value != 0 and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5


def in_order(results: Iterable[Expression]) -> list[Expression]:
    """Everything that the results are made of, arguments first."""
    order: dict[int, Expression] = {}
    waiting: list[tuple[Expression, bool]] = [(result, False) for result in reversed([*results])]
    while waiting:
        node, ready = waiting.pop()
        if id(node) in order:
            continue
        if ready:
            order[id(node)] = node
            continue
        waiting.append((node, True))
        waiting += [(argument, False) for argument in reversed(node.arguments)]
    return [*order.values()]


def evaluate(
    results: Iterable[Expression], values: Mapping[Any, Tensor], like: Tensor
) -> list[Tensor]:
    """The values by torch, from those of the inputs by key: `[..., N, C]`, or 1 in their place.

    `like` says the type of constants. A result that no input reaches is a 0-d tensor.
    """
    wanted = [*results]
    found: dict[int, Tensor] = {}
    for node in in_order(wanted):
        given = [found[id(argument)] for argument in node.arguments]
        if node.name == CONSTANT:
            found[id(node)] = like.new_full((), node.value)
        elif node.name == INPUT:
            found[id(node)] = values[node.value]
        elif node.name in _REDUCED:
            found[id(node)] = _REDUCED[node.name](given[0])
        elif node.name == "spread":
            found[id(node)] = given[0]  # torch broadcasts
        elif node.name == "held":
            found[id(node)] = given[0].detach()
        else:
            found[id(node)] = OPERATIONS[node.name].compute(*given)
    return [found[id(result)] for result in wanted]


_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum_columns": lambda x: x.sum(-1, keepdim=True),
    "max_columns": lambda x: x.amax(-1, keepdim=True),
    "peak": lambda x: x.detach().amax(-1, keepdim=True),
    "sum_rows": lambda x: x.sum(-2, keepdim=True),
}
