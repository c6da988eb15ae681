"""A function of one task's tensors for all tasks: mapped or looped, and then recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.network.layers.derivatives import ON_TAPE, UNDER_VMAP
from fastmeta.network.recording import recorded

_Function = Callable[..., Any]
_ENTRIES = 64
"""Of the operators that are kept."""


@dataclass(eq=False)
class OverTasks:
    """How the rules of one layer run, and the operators that they were found to run.

    Under `vmap` and `vjp` an operator costs many times its own time on a small task: so what a rule
    does is recorded once for tensors of one kind, and then run without either.
    """

    looped: set[Hashable] = field(default_factory=set)
    """The rules that `vmap` can't map."""
    _recorded: dict[Hashable, _Function | None] = field(default_factory=dict)
    """None where it can't be."""

    def run(
        self, one: _Function, name: Hashable, tensors: Sequence[Tensor], dims: Sequence[int | None],
        elementwise: bool,
    ) -> Any:  # fmt: skip
        """`one` for all tasks at once: tensors `[T, ...]` where the dimension is 0.

        `name` tells apart what is given to this; the first argument of `one` is the way to
        differentiate, the others are tensors.
        """
        tasks = len(tensors[0])
        if name in self.looped and not elementwise:
            return _loop(one, tensors, dims)
        key = (
            name, torch.get_default_dtype(),
            *((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
        )  # fmt: skip
        known = self._recorded.get(key)
        if known is not None:
            return known(*tensors)
        whole = _whole(one, dims, elementwise, tasks)
        if key in self._recorded or len(self._recorded) >= _ENTRIES:
            return self._checked(whole, one, name, tensors, dims, elementwise)
        found = self._checked(whole, one, name, tensors, dims, elementwise)
        self._recorded[key] = None if name in self.looped else recorded(whole, tensors)
        return found

    def _checked(
        self, whole: _Function, one: _Function, name: Hashable, tensors: Sequence[Tensor],
        dims: Sequence[int | None], elementwise: bool,
    ) -> Any:  # fmt: skip
        if elementwise or len(tensors[0]) == 1:
            return whole(*tensors)
        with warnings.catch_warnings():
            # The slow batching fallback announces itself so; it is a loop with overhead.
            warnings.filterwarnings("error", message=".*performance drop.*")
            try:
                return whole(*tensors)
            except Exception:  # of what kind differs; an error of the function's own comes again
                self.looped.add(name)
        return _loop(one, tensors, dims)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_recorded": {}}


def _whole(one: _Function, dims: Sequence[int | None], elementwise: bool, tasks: int) -> _Function:
    if elementwise:
        return lambda *tensors: one(ON_TAPE, *tensors)
    if tasks == 1:
        return lambda *tensors: _loop(one, tensors, dims)
    return torch.vmap(lambda *tensors: one(UNDER_VMAP, *tensors), tuple(dims))


def _loop(one: _Function, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> Any:
    """Task by task."""
    each = [
        one(ON_TAPE, *(x if d is None else x[t] for x, d in zip(tensors, dims, strict=True)))
        for t in range(len(tensors[0]))
    ]
    if isinstance(each[0], Tensor):
        return torch.stack(each)
    return tuple(map(torch.stack, zip(*each, strict=True)))
