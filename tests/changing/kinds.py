"""The kinds of change: each by its name, what it needs, and a generator that makes it.

A kind's generator changes a world, yields, and changes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from changing.world import World

Change = Generator[None, None, None]


@dataclass(frozen=True)
class Kind:
    """One way to change what a step depends on."""

    name: str
    needs: frozenset[str]
    """Parts without which there is nothing to change: a network, activations, a loss."""
    make: Callable[[World], Change]
    matters: bool
    """Whether it changes the loss or its gradient where it is the only change."""


KINDS: dict[str, Kind] = {}


def change(
    *needs: str, name: str = "", matters: bool = True
) -> Callable[[Callable[[World], Change]], Callable[[World], Change]]:
    """Registers a generator as a kind, under its own name unless another is given."""

    def register(make: Callable[[World], Change]) -> Callable[[World], Change]:
        called = name or getattr(make, "__name__", "")
        assert called not in KINDS, called
        KINDS[called] = Kind(called, frozenset(needs), make, matters)
        return make

    return register


def put(owner: Any, name: str, value: Any) -> Change:
    """Sets an attribute, and sets it back to an equal object that is new where it can be."""
    before = afresh(getattr(owner, name))  # an old tuple is freed, and its identity with it
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def put_item(owner: Any, key: Any, value: Any) -> Change:
    """The same of an item of a list or dict."""
    before = owner[key]
    owner[key] = value
    yield
    owner[key] = before


def afresh(value: Any) -> Any:
    """An equal tuple or list; anything else is itself."""
    return type(value)([*value]) if type(value) in (tuple, list) else value


def attribute(name: str, part: str, owner: Callable[[World], Any], key: str, value: Any) -> None:
    """Registers the kind that sets one attribute."""
    change(part, name=name)(lambda world: put(owner(world), key, afresh(value)))
