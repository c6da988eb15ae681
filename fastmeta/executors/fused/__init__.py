"""The fused executor: the whole meta-step of an MLP in one call of C++ or one launch of CUDA."""

from __future__ import annotations

from fastmeta.executors.fused.devices import grows, kernel_for, run
from fastmeta.executors.fused.kernel import Kernel, environment
from fastmeta.executors.fused.recipe import Recipe, recipe
from fastmeta.executors.fused.serving import declines

__all__ = ["Kernel", "Recipe", "declines", "environment", "grows", "kernel_for", "recipe", "run"]
