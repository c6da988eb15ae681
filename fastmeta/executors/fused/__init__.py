"""The fused executor: the whole meta-step of an MLP in one call of C++."""

from __future__ import annotations

from fastmeta.executors.fused.kernel import Kernel, environment, grows, kernel
from fastmeta.executors.fused.recipe import Recipe, recipe
from fastmeta.executors.fused.serving import declines
from fastmeta.executors.fused.step import run

__all__ = ["Kernel", "Recipe", "declines", "environment", "grows", "kernel", "recipe", "run"]
