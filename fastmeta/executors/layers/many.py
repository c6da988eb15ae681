"""Arithmetic on all parameters: on a GPU one launch for all that lie densely, elsewhere one by one.

On the CPU a list's temporaries would all be there at once, in fresh pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


def scaled(parts: Parameters, rates: Mapping[str, float | Tensor]) -> Parameters:
    """Each times its rate."""
    numbers = [rate for rate in (rates[name] for name in parts) if isinstance(rate, float)]
    if not _at_once(parts) or len(numbers) < len(parts):
        return {name: rates[name] * part for name, part in parts.items()}
    return dict(zip(parts, torch._foreach_mul([*parts.values()], numbers), strict=True))


def descended(
    totals: Parameters, parts: Parameters, rates: Mapping[str, float | Tensor]
) -> Parameters:
    """Of each part, what stands under its name in `totals` less its rate times it."""
    if not _at_once(parts):
        return {name: totals[name] - rates[name] * part for name, part in parts.items()}
    there, steps = [totals[name] for name in parts], [*scaled(parts, rates).values()]
    return dict(zip(parts, torch._foreach_sub(there, steps), strict=True))


def add(totals: Parameters, parts: Parameters, sign: float) -> None:
    """Adds `sign` times the parts to the totals; one that is not there yet begins with its part."""
    if not _at_once(parts):
        for name, part in parts.items():
            there = totals.get(name)
            if there is None:
                totals[name] = part if sign == 1 else sign * part
            else:
                totals[name] = there.add(part, alpha=sign)
        return
    new = {name: part for name, part in parts.items() if name not in totals}
    old = {name: part for name, part in parts.items() if name in totals}
    totals.update(new if sign == 1 else scaled(new, dict.fromkeys(new, sign)))
    if old:
        sums = torch._foreach_add([totals[name] for name in old], [*old.values()], alpha=sign)
        totals.update(zip(old, sums, strict=True))


def over_tasks(parts: Parameters) -> Parameters:
    """The sums of `[T, ...]` over tasks, `[1, ...]`."""
    if not _at_once(parts):
        return {name: part.sum(0, keepdim=True) for name, part in parts.items()}
    sums = torch.cat([part.flatten(1) for part in parts.values()], 1).sum(0)
    pieces = sums.split([part[0].numel() for part in parts.values()])
    return {
        name: piece.view(1, *part.shape[1:])
        for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }


def _at_once(parts: Parameters) -> bool:
    return bool(parts) and next(iter(parts.values())).is_cuda
