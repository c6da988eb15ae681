"""Learning rates as the fused kernels take them, and their gradients back from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmeta.inner_loop import SHARED, InnerLoop


def elementwise(inner: InnerLoop) -> bool:
    """Whether any parameter has a learning rate for each of its elements."""
    if inner.shared:
        return False
    return any(
        isinstance(rate, Tensor) and rate.numel() > (rate.shape[0] if key in inner.per_step else 1)
        for key, rate in inner.rates.items()
    )


def packed(
    inner: InnerLoop, named: Mapping[str, Tensor], names: Sequence[str | None], like: Tensor
) -> Tensor:
    """`[K, tensors]`, or `[K, P]` if elementwise; zero where nothing adapts."""
    steps, adapted, each = inner.steps, set(inner.adapted), elementwise(inner)
    columns: list[Tensor] = []
    for name in names:
        if name is None and each:
            continue
        width = named[name].numel() if name is not None and each else 1
        if name is None or name not in adapted:
            columns.append(like.new_zeros(steps, width))
            continue
        key = SHARED if inner.shared else name
        given = inner.rates[key]
        number = given if isinstance(given, Tensor) else like.new_full((), given)
        rate = number.detach().to(like)
        shape = tuple(named[name].shape) if each else ()
        if key in inner.per_step:
            rate = rate[:steps]  # the trial takes fewer steps than there are rates
        if not each:
            rate = rate.reshape(steps if key in inner.per_step else ())
        columns.append(rate.expand(steps, *shape).reshape(steps, width))
    return torch.cat(columns, dim=1)


def gradients(
    inner: InnerLoop,
    named: Mapping[str, Tensor],
    names: Sequence[str | None],
    found: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Every learned rate with its gradient, from `found [K, tensors]` or `[K, P]`."""
    pairs: list[tuple[Tensor, Tensor]] = []
    each = elementwise(inner)
    places = _places(named, names) if each else {}
    for key, rate in inner.learned_rates().items():
        if each:
            part = found[:, places[key]].reshape(inner.steps, *named[key].shape)
        else:
            wanted = inner.adapted if key == SHARED else (key,)
            chosen = [i for i, name in enumerate(names) if name in wanted]
            # By columns: a list of indices would be copied to the device, and waited for.
            part = torch.stack([found[:, i] for i in chosen]).sum(0)
        if key not in inner.per_step:
            part = part.sum(0)
        elif inner.steps < rate.shape[0]:
            missing = part.new_zeros(rate.shape[0] - inner.steps, *part.shape[1:])
            part = torch.cat([part, missing])
        part = part.sum_to_size(rate.shape) if each else part.reshape(rate.shape)
        pairs.append((rate, part.to(rate)))
    return pairs


def _places(named: Mapping[str, Tensor], names: Sequence[str | None]) -> dict[str, slice]:
    """Where each parameter lies among the P numbers of all."""
    places: dict[str, slice] = {}
    start = 0
    for name in names:
        if name is not None:
            places[name] = slice(start, start + named[name].numel())
            start += named[name].numel()
    return places
