"""The fused executor: the whole meta-step of an MLP in one call of C++."""

from __future__ import annotations

from fastmeta.executors.fused.kernel import Kernel, environment, extension, grows, kernel
from fastmeta.executors.fused.recipe import Declined, Recipe, recipe
from fastmeta.executors.fused.serving import declines
from fastmeta.executors.fused.step import WrongLabel, run

__all__ = [
    "Declined", "Kernel", "Recipe", "WrongLabel", "declines", "environment", "extension", "grows",
    "kernel",
    "recipe", "run",
]  # fmt: skip
