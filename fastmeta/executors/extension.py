"""The compiled kernels, where this installation has them."""

from __future__ import annotations

import importlib
from types import ModuleType


def extension() -> ModuleType | None:
    """`fastmeta._C`, or None."""
    try:
        module = importlib.import_module("fastmeta._C")
    except ImportError:
        return None
    # An editable install may still have the extension of an earlier checkout.
    return module if hasattr(module, "OpenPasses") else None


extension()  # What it remembers of this process must be from before any fork.
