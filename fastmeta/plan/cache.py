"""Results about a model, the least recently used forgotten first, bounded by memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

_MOST = 16 << 20
"""Bytes for one model."""
_ENTRY = 4 << 10
"""Bytes of an entry that is no tensor, by estimate: a plan with its kernel, a check's result."""

T = TypeVar("T")


@dataclass(eq=False)
class Entry:
    """Something kept, with its bytes and the time when it was last asked for."""

    value: Any
    size: int
    used: int


class Cache:
    """A dictionary whose least recently used entries go when it has grown too large."""

    def __init__(self, most: int = _MOST) -> None:
        self._entries: dict[Hashable, Entry] = {}
        self._most = most
        self._bytes = self._now = 0

    def __len__(self) -> int:
        return len(self._entries)

    def token(self, key: Hashable) -> Entry:
        """A short key in place of a long one, which lasts as long as something is found by it."""
        self.find(key, lambda: None)
        return self._entries[key]

    def find_for(self, token: Entry, key: Hashable, make: Callable[[], T]) -> T:
        """The result that belongs to a token, made if there is none."""
        token.used = self._now
        return self.find((token, key), make)

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result that belongs to `key`, made if there is none."""
        self._now += 1
        entry = self._entries.get(key)
        if entry is not None:  # a key is hashed once: it may be a deep tuple
            entry.used = self._now
            return entry.value
        value = make()
        size = _ENTRY + (value.nbytes if isinstance(value, Tensor) else 0)
        self._bytes += size
        if self._bytes > self._most:
            self._forget()
        self._entries[key] = Entry(value, size, self._now)
        return value

    def _forget(self) -> None:
        """Drops the entries that were used least recently, down to half of the memory."""
        for key, entry in sorted(self._entries.items(), key=lambda item: item[1].used):
            if self._bytes <= self._most // 2:
                break
            del self._entries[key]
            self._bytes -= entry.size
