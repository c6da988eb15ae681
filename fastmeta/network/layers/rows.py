"""Sums over the rows of `[T, R, C]`, and weighted sums of rows, in torch's operators.

Factors are centred before they are multiplied: sums of products of values far from zero lose the
digits in which these differ. torch's sums add up in pairs, so that their rounding does not grow
with R, as that of its batch norm does where channels are last. Some rows go at a time, and what is
made on the way stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BYTES = 2 << 20
"""Bytes of the rows that go at once on a CPU. On a core with 1 MB of second-level cache, 1 to 4 MB
took the same time, 256 kB and everything at once up to half as much again."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `[T, R, C]`, less a centre `[S, 1, C]` if there is one."""

    values: Tensor
    centre: Tensor | None = None

    @property
    def count(self) -> int:
        """R."""
        return self.values.shape[1]

    def at(self, some: slice, buffer: Tensor) -> Tensor:
        """Some of them, computed in `buffer` if there is a centre."""
        part = self.values[:, some]
        return part if self.centre is None else torch.sub(part, self.centre, out=buffer)


def mean(values: Tensor) -> Tensor:
    """The mean over the rows, `[T, 1, C]`."""
    return values.mean(1, keepdim=True)


def sums(*products: Sequence[Rows]) -> tuple[Tensor, ...]:
    """The sum over the rows of each product of one or two factors, `[T, 1, C]`."""
    like = products[0][0].values
    parts = _parts(like)
    buffer, other = like.new_empty(2, len(like), parts[0].stop, like.shape[2])
    found = like.new_empty(len(products), len(parts), len(like), like.shape[2])
    for i, some in enumerate(parts):
        rows = slice(some.stop - some.start)
        for (first, *rest), of_product in zip(products, found, strict=True):
            factor = first.at(some, buffer[:, rows])
            for second in rest:
                another = factor if second is first else second.at(some, other[:, rows])
                factor = torch.mul(factor, another, out=buffer[:, rows])
            torch.sum(factor, 1, out=of_product[i])
    return found.sum(1).unsqueeze(2).unbind()


def weighted(constant: Tensor | None, *terms: tuple[Rows, Tensor]) -> Tensor:
    """`constant` plus the sum of rows times factors, all these `[S, 1, C]`; `[T, R, C]`.

    Centres go into the constant, as in torch's own batch norm.
    """
    for rows, factor in terms:
        if rows.centre is not None:
            away = rows.centre * factor
            constant = -away if constant is None else constant - away
    (first, factor), *rest = terms
    total = torch.empty_like(first.values, memory_format=torch.contiguous_format)
    for some in _parts(total):
        into = total[:, some]
        if constant is None:
            torch.mul(first.values[:, some], factor, out=into)
        else:
            torch.addcmul(constant, first.values[:, some], factor, out=into)
        for rows, weight in rest:
            into.addcmul_(rows.values[:, some], weight)
    return total


def _parts(values: Tensor) -> list[slice]:
    tasks, count, channels = values.shape
    most = count
    if values.device.type == "cpu":
        most = min(count, max(1, _BYTES // (tasks * channels * values.element_size())))
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]
