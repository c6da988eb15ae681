"""Arithmetic on all parameters at once: one launch on a GPU, where they lie densely."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def scaled(parts: Parameters, rates: Mapping[str, float | Tensor]) -> Parameters:
    """Each times its rate."""
    if not parts:
        return {}
    values, factors = list(parts.values()), [rates[name] for name in parts]
    numbers = [factor for factor in factors if isinstance(factor, float)]
    if len(numbers) == len(factors):
        products = list(torch._foreach_mul(values, numbers))
    else:
        products = [factor * value for factor, value in zip(factors, values, strict=True)]
    return dict(zip(parts, products, strict=True))


def minus(totals: Parameters, parts: Parameters) -> Parameters:
    """The parameters of `parts`, each taken from what stands under its name in `totals`."""
    if not parts:
        return {}
    found = torch._foreach_sub([totals[name] for name in parts], list(parts.values()))
    return dict(zip(parts, found, strict=True))


def add(totals: Parameters, parts: Parameters, sign: float) -> None:
    """Adds `sign` times the parts to the totals; one that is not there yet begins with its part."""
    old = [name for name in parts if name in totals]
    new = {name: part for name, part in parts.items() if name not in totals}
    totals.update(new if sign == 1 else scaled(new, dict.fromkeys(new, sign)))
    if old:
        there, more = [totals[name] for name in old], [parts[name] for name in old]
        totals.update(zip(old, torch._foreach_add(there, more, alpha=sign), strict=True))


def over_tasks(parts: Parameters) -> Parameters:
    """The sums of `[T, ...]` over tasks, `[1, ...]`."""
    if not parts:
        return {}
    sums = torch.cat([part.flatten(1) for part in parts.values()], 1).sum(0)
    pieces = sums.split([part[0].numel() for part in parts.values()])
    return {
        name: piece.view(1, *part.shape[1:])
        for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }
