"""Whether Triton can take a fused step."""

from __future__ import annotations

import torch

from fastmeta.executors.fused.lowering import Recipe
from fastmeta.executors.fused.operations.kernel import kernel
from fastmeta.executors.problem import Problem
from fastmeta.executors.triton_device import missing, too_old


def declines(problem: Problem, recipe: Recipe, low_memory: bool) -> str | None:
    """Why Triton can't take a problem that fused kernels can; None where it can."""
    device = problem.task_weights.device
    nothing_works = missing()
    why = nothing_works[0] if nothing_works else too_old(device)
    if why is not None:
        return why
    step = kernel(problem, recipe)
    if low_memory and problem.inner.steps > 1 and step.layout.sizes.sweeps:
        return "memory='low' asks for memory flat in K, and Triton's step keeps every inner step"
    needed, there = step.storage_bytes, memory(device)
    if there is not None and needed > there:
        return f"its matrices take {needed:,} bytes, {device} has {there:,}"
    return None


def memory(device: torch.device) -> int | None:
    """Of a GPU, in bytes."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory
