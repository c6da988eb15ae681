"""Options of update rules: numbers, or 0-d tensors that may be learned."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from fastmeta.wording import a_kind

Option = float | Tensor


def option(label: str, value: Any, *, below: float = math.inf) -> Option:
    """Check an option that may be a 0-d tensor, whose value stays unread."""
    if not isinstance(value, Tensor):
        return number(label, value, below=below, also=" or a 0-d tensor")
    if not value.is_floating_point():
        raise TypeError(f"{label}: a tensor of {value.dtype}; it must be floating point")
    if value.dim():
        raise ValueError(f"{label}: shape {list(value.shape)}; a tensor must be 0-d")
    return value


def number(label: str, value: Any, *, below: float = math.inf, also: str = "") -> float:
    """Check a number of `[0, below)`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{label}: {a_kind(value)}; it must be a number{also}")
    given = float(value)
    if not 0 <= given < below:
        must = "not be negative, and finite" if below == math.inf else f"be of [0, {below:g})"
        raise ValueError(f"{label}: {value}; it must {must}")
    return given


def flag(label: str, value: Any) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{label}: {value!r}; it must be True or False")
    return value


def norm(label: str, value: Any) -> float | None:
    """Check the largest norm of a gradient; None is no limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{label}: {a_kind(value)}; it must be a number, or None for no clipping")
    given = float(value)
    if not 0 < given < math.inf:
        raise ValueError(f"{label}: {value}; it must be positive and finite, or None")
    return given


def is_zero(value: Option) -> bool:
    """Return whether an option is the number 0; a tensor is not, whatever its value."""
    return not isinstance(value, Tensor) and value == 0


def as_number(value: Option) -> float:
    """The value of an option; a GPU is waited for where it is a tensor there."""
    return value.item() if isinstance(value, Tensor) else value
