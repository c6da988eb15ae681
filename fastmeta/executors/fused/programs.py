"""Losses as the fused kernels' programs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmeta.executors.base import NotSupported
from fastmeta.executors.extension import extension
from fastmeta.executors.programs import compiled
from fastmeta.network.expressions.derivatives import gradients, tangents
from fastmeta.network.expressions.expression import (
    Expression,
    constant,
    operate,
    reduce,
    spread,
    variable,
)
from fastmeta.network.expressions.program import Matrix
from fastmeta.network.losses.traced import CAPTURED, PREDICTION, TARGET, TracedLoss, base, inputs

# In the order of csrc/expression.h.
_PREDICTION, _DIRECTION, _WEIGHTS, _VALUE, _RESULT, _INPUTS = range(6)
_MOST_INPUTS = 8


@dataclass(frozen=True)
class LossInput:
    """A tensor that a loss reads beside the prediction."""

    key: tuple[Any, ...]
    """`(TARGET, leaf)` or `(CAPTURED, place)`."""
    of_examples: bool
    columns: int
    learns: bool


@dataclass(frozen=True, eq=False)
class LossPrograms:
    """A loss's programs on one set, and what they read."""

    inputs: tuple[LossInput, ...]
    made: Any
    """The kernels' own."""


def loss(traced: TracedLoss, learning: frozenset[int], is_query: bool) -> LossPrograms:
    """The kernels' programs of a loss; the captured tensors at these places get a gradient.

    **Raises** `NotSupported` where they are too long.
    """
    return _loss(traced, learning, is_query)


@functools.lru_cache(maxsize=128)
def _loss(traced: TracedLoss, learning: frozenset[int], is_query: bool) -> LossPrograms:
    weight = variable(("weight",))
    value = reduce("sum_rows", operate("multiply", spread(traced.each, True, 1), weight))
    read = inputs(value)
    predictions = [each for each in read if base(each.value) == (PREDICTION,)]
    learned = [each for each in read if _learns(base(each.value), learning)]
    given = _inputs(traced, [base(each.value) for each in read], learning)
    places = {each.key: _INPUTS + 2 * i for i, each in enumerate(given)}
    matrices: dict[Expression, Matrix] = {weight: Matrix(_WEIGHTS)}
    for each in read:
        key = base(each.value)
        if key == (PREDICTION,):
            matrices[each] = Matrix(_PREDICTION, _first(each))
        elif key in places:
            matrices[each] = Matrix(places[key], _first(each))
    found = gradients(value, [*predictions, *learned])
    of_prediction, of_learned = found[: len(predictions)], found[len(predictions) :]
    directions = {
        each: variable(("direction", *each.value), True, each.columns) for each in predictions
    }
    along = {
        **matrices,
        **{d: Matrix(_DIRECTION, _first(each)) for each, d in directions.items()},
    }
    moved = tangents([*map(_or_zero, of_prediction), *map(_or_zero, of_learned)], directions)
    gradient = _by_columns(traced, predictions, of_prediction)
    tangent = _by_columns(traced, predictions, moved[: len(predictions)])
    captured = list(zip(learned, of_learned, strict=True))
    of_captured = list(zip(learned, moved[len(predictions) :], strict=True))
    # A query set's are those of the loss itself, a support set's come through the inner steps.
    gradient += [(value, Matrix(_VALUE))]
    of_query = captured if is_query else [(each, None) for each in learned]
    widths = dict(traced.captured)
    gradient += _of_learned(of_query, places, widths)
    tangent += _of_learned(of_captured, places, widths)
    module = extension()
    assert module is not None
    programs = (
        compiled([(value, Matrix(_VALUE))], matrices),
        compiled(gradient, matrices),
        compiled(tangent, along),
    )
    described = [(each.of_examples, each.columns, each.learns) for each in given]
    return LossPrograms(given, module.LossPrograms(*programs, described))


def _learns(key: tuple[Any, ...], learning: frozenset[int]) -> bool:
    return key[0] == CAPTURED and key[1] in learning


def _inputs(
    traced: TracedLoss, keys: list[tuple[Any, ...]], learning: frozenset[int]
) -> tuple[LossInput, ...]:
    columns = dict(traced.captured)
    found: list[LossInput] = []
    for key in dict.fromkeys(keys):
        if key[0] == TARGET:
            sizes = [axis for axis in traced.targets[key[1]][1:] if axis != 1]
            found.append(LossInput(key, True, sizes[0] if sizes else 1, False))
        elif key[0] == CAPTURED:
            found.append(LossInput(key, False, columns[key[1]], _learns(key, learning)))
    if len(found) > _MOST_INPUTS:
        raise NotSupported(f"the loss reads {len(found)} tensors, the kernels take {_MOST_INPUTS}")
    return tuple(found)


def _first(each: Expression) -> int:
    return each.value[2] if each.value[0] == "columns" else 0


def _or_zero(expression: Expression | None) -> Expression:
    return constant(0.0) if expression is None else expression


def _by_columns(
    traced: TracedLoss, predictions: list[Expression], found: list[Expression | None]
) -> list[tuple[Expression, Matrix]]:
    """Gradients by some columns of the prediction each, as results that fill all of its columns."""
    zero = spread(constant(0.0), True, traced.outputs)
    pairs = [(p, g) for p, g in zip(predictions, found, strict=True) if g is not None]
    if len(pairs) == 1 and pairs[0][0].columns == traced.outputs:
        each, gradient = pairs[0]
        return [(spread(gradient, True, each.columns), Matrix(_RESULT))]
    return [
        (zero, Matrix(_RESULT)),
        *(
            (spread(gradient, True, each.columns), Matrix(_RESULT, _first(each), adds=True))
            for each, gradient in pairs
        ),
    ]


def _of_learned(
    pairs: Sequence[tuple[Expression, Expression | None]],
    places: Mapping[tuple[Any, ...], int],
    widths: Mapping[int, int],
) -> list[tuple[Expression, Matrix]]:
    """Gradients by columns of captured tensors, as results that fill all of each."""
    results: list[tuple[Expression, Matrix]] = []
    for key in dict.fromkeys(base(each.value) for each, _ in pairs):
        place, of = places[key], [(each, g) for each, g in pairs if base(each.value) == key]
        results.append((spread(constant(0.0), False, widths[key[1]]), Matrix(place + 1)))
        results += [
            (spread(gradient, False, each.columns), Matrix(place + 1, _first(each), adds=True))
            for each, gradient in of
            if gradient is not None
        ]
    return results
