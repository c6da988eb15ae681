"""Results about a model, those not used for longest forgotten first, bounded by memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

_MOST = 16 << 20
"""Bytes for one model."""
_ENTRY = 4 << 10
"""Bytes of an entry that is no tensor, by estimate: a plan with its kernel, a check's result."""

T = TypeVar("T")


class Cache:
    """Two generations: the entries used since the young one began, and the others used before.

    When the young generation fills half of the memory, it becomes the old one and the old one goes.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._bytes = 0
        self._young: dict[Hashable, tuple[Any, int]] = {}
        self._old: dict[Hashable, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len({**self._young, **self._old})

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result that belongs to `key`, made if there is none."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.get(key)
            if entry is None:
                value = make()
                entry = value, _ENTRY + (value.nbytes if isinstance(value, Tensor) else 0)
            self._bytes += entry[1]
            if self._bytes > self._most // 2:
                self._old, self._young, self._bytes = self._young, {}, entry[1]
            self._young[key] = entry
        return entry[0]
