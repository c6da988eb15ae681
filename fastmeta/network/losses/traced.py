"""Losses of the user's own as expressions: traced, with what they read beside their arguments.

The loss of a task is the mean of an expression over its examples. Inputs of the expression are
known by `(PREDICTION,)`, `(TARGET, leaf)` and `(CAPTURED, place)`, the place being that among what
the function reads; some columns of one by `("columns", key, first)`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.expressions.expression import Expression, in_order, variable
from fastmeta.network.expressions.tracing import EXAMPLES, Axes, Symbol, Untraceable, width
from fastmeta.network.expressions.vocabulary import COUNT
from fastmeta.network.losses.reads import Reads
from fastmeta.tasks import Tree, map_tensors

PREDICTION, TARGET, CAPTURED = "prediction", "target", "captured"
_COUNTS = (10007, 10009)
"""Numbers of examples that no other size equals; a trace must not depend on it."""


@dataclass(frozen=True, eq=False)
class TracedLoss:
    """A loss as an expression."""

    each: Expression
    """Of an example; the loss is its mean over a task's."""
    outputs: int
    """The number of columns of the prediction."""
    targets: tuple[Axes, ...]
    """The axes of the targets' leaves, in order."""
    captured: tuple[tuple[int, int], ...]
    """The places that it reads, among the function's values, and their columns."""

    def values(self, reads: Reads) -> list[Any]:
        """The numbers and tensors that stand at its places now."""
        return [reads.values[place] for place, _ in self.captured]


def trace(reads: Reads, outputs: int, targets: Tree) -> TracedLoss:
    """Trace a loss on predictions `[N, outputs]` and targets `[T, N, ...]`.

    **Raises** `Untraceable` with the reason.
    """
    if not reads.known:
        raise Untraceable(f"the loss {reads.unknown}")
    # Numbers are arguments of a step, as tensors are: a plan does not depend on them.
    marked = [i for i, v in enumerate(reads.values) if type(v) is float or isinstance(v, Tensor)]
    axes: list[Axes] = []

    def leaf(tensor: Tensor) -> Axes:
        if tensor.dim() > 3 or tensor.is_complex():
            raise Untraceable(f"targets are {list(tensor.shape)}")
        shape = tuple(tensor.shape[2:])
        axes.append((EXAMPLES, *shape))
        return axes[-1]

    map_tensors(leaf, targets)
    found: list[Expression] = []
    for count in _COUNTS:
        symbols = {place: _captured(reads.values[place], place, count) for place in marked}
        prediction = Symbol(variable((PREDICTION,), True, outputs), (EXAMPLES, outputs), count)
        given = _targets(targets, axes, count)
        with torch.enable_grad():
            try:
                result = reads.with_values(symbols)(prediction, given)
            except Untraceable:
                raise
            except Exception as error:  # the user's code on something that is no tensor
                raise Untraceable(f"it can't be traced ({error})") from error
        if not isinstance(result, Symbol) or result.axes or not result.is_mean:
            raise Untraceable("it is no mean over examples")
        found.append(result.expression)
    if found[0] is not found[1]:
        raise Untraceable("it computes with the number of examples")
    return TracedLoss(found[0], outputs, tuple(axes), _places(found[0]))


def _captured(value: Any, place: int, count: int) -> Symbol:
    if not isinstance(value, Tensor):
        return Symbol(variable((CAPTURED, place), False), (), count)
    axes = tuple(value.shape)
    if sum(size != 1 for size in axes) > 1:
        raise Untraceable(f"it reads a tensor of shape {list(axes)}")
    return Symbol(variable((CAPTURED, place), False, width(axes)), axes, count)


def _targets(targets: Tree, axes: Sequence[Axes], count: int) -> Any:
    numbers = iter(range(len(axes)))

    def symbol(_: Tensor) -> Any:
        i = next(numbers)
        return Symbol(variable((TARGET, i), True, width(axes[i])), axes[i], count)

    return map_tensors(symbol, targets)


def base(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of the whole input that some columns belong to."""
    return key[1] if key[0] == "columns" else key


def inputs(of: Expression) -> list[Expression]:
    """The inputs that an expression reads."""
    return [node for node in in_order([of]) if node.name == "input"]


def _places(of: Expression) -> tuple[tuple[int, int], ...]:
    columns: Mapping[int, int]
    columns = {
        base(node.value)[1]: node.columns for node in inputs(of) if base(node.value)[0] == CAPTURED
    }
    return tuple(sorted(columns.items()))


@functools.cache
def labels(loss: TracedLoss) -> tuple[tuple[int, int], ...]:
    """The leaves of the targets that it compares with the numbers of columns, and how many."""
    found: dict[int, int] = {}
    for node in in_order([loss.each]):
        if node.name == "equal":
            keys = {side.value[0]: side for side in node.arguments if side.name == "input"}
            if TARGET in keys and "index" in keys:
                found[keys[TARGET].value[1]] = keys["index"].columns
    return tuple(found.items())


def uses_count(loss: TracedLoss) -> bool:
    """Return whether it depends on the number of examples: a sum over them."""
    return any(node.value == COUNT for node in inputs(loss.each))
