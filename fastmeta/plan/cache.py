"""Results about a model, the least recently used forgotten first, bounded by memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

_MOST = 16 << 20
"""Bytes for one model."""
_ENTRY = 4 << 10
"""Bytes of an entry that is no tensor, by estimate: a plan with its kernel, a check's result."""

T = TypeVar("T")


class Cache:
    """A dictionary whose least recently used entries go when it has grown too large."""

    def __init__(self, most: int = _MOST) -> None:
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._most = most
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry for `key`, made if there is none."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry[0]
        value = make()
        size = _ENTRY + (value.nbytes if isinstance(value, Tensor) else 0)
        self._entries[key] = value, size
        self._bytes += size
        while self._bytes > self._most and len(self._entries) > 1:
            _, (_, gone) = self._entries.popitem(last=False)
            self._bytes -= gone
        return value
