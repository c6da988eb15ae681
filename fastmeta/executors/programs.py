"""Expressions as programs that the compiled kernels interpret: those of activations."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fastmeta.executors.base import NotSupported
from fastmeta.executors.extension import extension
from fastmeta.network.expressions.derivatives import jet
from fastmeta.network.expressions.expression import Expression, spread
from fastmeta.network.expressions.program import Matrix, TooLong, program
from fastmeta.network.losses.traced import inputs


@functools.lru_cache(maxsize=64)
def of_activation(expression: Expression) -> tuple[Any, Any, Any]:
    """The programs of an elementwise function that give its value, slope and curvature.

    The second gives the first two of these, the third the value alone. **Raises** `NotSupported`
    where they are too long.
    """
    (z,) = inputs(expression)
    # The argument is matrix 0.
    results = [
        (spread(each, True, 1), Matrix(place)) for place, each in enumerate(jet(expression, z), 1)
    ]
    whole, short, value = (compiled(results[:count], {z: Matrix(0)}) for count in (3, 2, 1))
    return whole, short, value


def compiled(
    results: Sequence[tuple[Expression, Matrix]], given: Mapping[Expression, Matrix]
) -> Any:
    """The kernels' own form of a program; **raises** `NotSupported` where it is too long."""
    module = extension()
    assert module is not None
    try:
        return module.Program(*program(results, given).arguments)
    except TooLong as error:
        raise NotSupported(str(error)) from error
