"""The fused executor: the whole meta-step of an MLP in one call of C++, or one launch on a GPU."""

from __future__ import annotations

from fastmeta.executors.fused.engines import (
    Kernel,
    declines,
    kernel_for,
    like,
    on_cpu,
    run,
)
from fastmeta.executors.fused.recipe import Recipe, recipe

__all__ = [
    "Kernel", "Recipe", "declines", "kernel_for", "like", "on_cpu", "recipe", "run",
]  # fmt: skip
