"""Warnings that name the caller's line, however deep they arise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

# torch's own frames stand between a caller and a module's forward.
_INSIDE = tuple(f"{Path(module).parent}/" for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A `UserWarning` at the line that called into fastmeta."""
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(_INSIDE) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
