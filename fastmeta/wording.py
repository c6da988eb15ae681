"""Articles and plurals in messages."""

from __future__ import annotations

from typing import Any


def a_kind(value: Any) -> str:
    """The name of a value's type with its article: "an int"."""
    return with_article(type(value).__name__)


def with_article(noun: str) -> str:
    """A noun with its article: "an Embedding"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 step", "1,024 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
