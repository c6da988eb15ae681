"""What torch's functions and methods give of symbols, by name.

Functions that are compositions stand here as such; what torch has under another name is an alias.
"""

from fastmeta.network.expressions.vocabulary import (
    activations,
    arithmetic,
    losses,
    reductions,
    shapes,
)
from fastmeta.network.expressions.vocabulary.registry import ANSWERS, COUNT

__all__ = ["ANSWERS", "COUNT", "ELEMENTWISE", "losses", "reductions", "shapes"]

_NUMBER_BY_NUMBER = (arithmetic.__name__, activations.__name__)
_CASTS = ("float", "double", "type_as", "to")

ELEMENTWISE = frozenset([
    "module",
    *(name for name, answer in ANSWERS.items() if answer.__module__ in _NUMBER_BY_NUMBER),
]).difference(_CASTS)  # fmt: skip
"""The names of what computes number by number, a module of torch's among them; no casts."""
