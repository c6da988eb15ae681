"""The answers of symbols to torch's functions and methods, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COUNT = ("count",)
"""The key of the number of examples."""


def index_key(columns: int) -> tuple[str, int]:
    """The key of the numbers 0 .. columns - 1."""
    return "index", columns


ANSWERS: dict[str, Callable[..., Any]] = {}


def answers(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under these names; its own where none is given."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names or (function.__name__.strip("_"),):
            ANSWERS[name] = function
        return function

    return register
