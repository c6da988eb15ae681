"""Losses of the user's own as expressions: traced, with what they read beside their arguments.

The loss of a task is the mean of an expression over its examples. Inputs of the expression are
known by `(PREDICTION,)`, `(TARGET, leaf)` and `(CAPTURED, place)`, the place being that among what
the function reads; some columns of one by `("columns", key, first)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.expressions.expression import Expression, in_order, variable
from fastmeta.network.expressions.tracing import EXAMPLES, Axes, Symbol, Trace, Untraceable, width
from fastmeta.network.losses.reads import Reads
from fastmeta.tasks import Tree, map_tensors

PREDICTION, TARGET, CAPTURED = "prediction", "target", "captured"


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
    assumes_many: bool
    """Whether it holds for more than one example alone: squeeze takes the axis of one away."""

    def values(self, reads: Reads) -> list[Any]:
        """The numbers and tensors that stand at its places now."""
        return [reads.values[place] for place, _ in self.captured]


def trace(reads: Reads, shape: tuple[int, ...], targets: Tree, dtype: torch.dtype) -> TracedLoss:
    """Trace a loss on predictions `[N, *shape]` of a dtype, and targets `[T, N, ...]`.

    `shape` is `(C,)`, or empty.

    **Raises** `Untraceable` with the reason.
    """
    if not reads.known:
        raise Untraceable(f"the loss {reads.unknown}")
    # Numbers are arguments of a step, as tensors are: a plan does not depend on them.
    marked = [i for i, v in enumerate(reads.values) if type(v) is float or isinstance(v, Tensor)]
    made, axes = Trace(dtype), list[Axes]()
    (outputs,) = shape or (1,)

    def target(leaf: Tensor) -> Symbol:
        if leaf.dim() > 3 or leaf.dtype not in (*_INTEGERS, dtype):
            raise Untraceable(f"a target is {leaf.dtype} of shape {list(leaf.shape)}")
        axes.append((EXAMPLES, *leaf.shape[2:]))
        key = variable((TARGET, len(axes) - 1), True, width(axes[-1]))
        return Symbol(key, axes[-1], made, dtype=leaf.dtype)

    with torch.enable_grad():  # whatever the caller's mode: without it symbols are constants
        symbols = {place: _captured(reads.values[place], place, made) for place in marked}
        prediction = Symbol(variable((PREDICTION,), True, outputs), (EXAMPLES, *shape), made)
        given = map_tensors(target, targets)
        try:
            result = reads.with_values(symbols)(prediction, given)
        except Exception as error:  # the user's code on something that is no tensor
            raise Untraceable(f"it can't be traced ({error})") from error
    if not isinstance(result, Symbol) or result.axes or not result.is_mean:
        raise Untraceable("it is no mean over examples")
    each = result.expression
    _check_labels(each)
    read = dict.fromkeys(base(node.value) for node in inputs(each))
    captured = sorted(key[1] for key in read if key[0] == CAPTURED)
    columns = tuple((place, symbols[place].expression.columns) for place in captured)
    return TracedLoss(each, outputs, tuple(axes), columns, made.assumes_many)


_INTEGERS = (torch.int64, torch.int32, torch.bool)


def _captured(value: Any, place: int, made: Trace) -> Symbol:
    if not isinstance(value, Tensor):
        return Symbol(variable((CAPTURED, place), False), (), made, is_number=True)
    axes = tuple(value.shape)
    if sum(size != 1 for size in axes) > 1 or value.numel() == 0:
        raise Untraceable(f"it reads a tensor of shape {list(axes)}")
    if value.dtype not in (*_INTEGERS, made.dtype):
        raise Untraceable(f"it reads a tensor of {value.dtype}")
    key = variable((CAPTURED, place), False, width(axes))
    return Symbol(key, axes, made, dtype=value.dtype)


def _check_labels(each: Expression) -> None:
    """**Raises** where labels are computed, so that nothing can check that they are classes."""
    for node in in_order([each]):
        compared = node.name == "equal" and any(map(_is_index, node.arguments))
        columns = node.columns
        if compared and not any(_is_label(a) or _is_place(a, columns) for a in node.arguments):
            raise Untraceable("it computes labels")


def _is_index(side: Expression) -> bool:
    return side.name == "input" and side.value[0] == "index"


def _is_label(side: Expression) -> bool:
    return side.name == "input" and side.value[0] == TARGET and side.columns == 1


def _is_place(side: Expression, columns: int) -> bool:
    """Return whether it is the place of the largest of no more columns than there are."""
    if side.name != "negate" or side.arguments[0].name != "peak":
        return False
    return side.arguments[0].arguments[0].columns <= columns


def base(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of the whole input that some columns belong to."""
    return key[1] if key[0] == "columns" else key


def inputs(of: Expression) -> list[Expression]:
    """The inputs that an expression reads."""
    return [node for node in in_order([of]) if node.name == "input"]


@functools.cache
def labels(loss: TracedLoss) -> tuple[tuple[int, int], ...]:
    """The leaves of the targets that it compares with the numbers of columns, and how many."""
    found: dict[int, int] = {}
    for node in in_order([loss.each]):
        if node.name == "equal":
            keys = {side.value[0]: side for side in node.arguments if side.name == "input"}
            if TARGET in keys and "index" in keys:
                leaf, classes = keys[TARGET].value[1], keys["index"].columns
                found[leaf] = min(classes, found.get(leaf, classes))
    return tuple(found.items())
