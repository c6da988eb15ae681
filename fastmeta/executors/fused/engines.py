"""The choice of a fused step's engine: this processor's C++; on a GPU CUDA kernels or Triton's."""

from __future__ import annotations

import torch

from fastmeta.executors import triton_device
from fastmeta.executors.extension import extension
from fastmeta.executors.fused import cuda, cuda_step, serving, step
from fastmeta.executors.fused import kernel as cpu
from fastmeta.executors.fused.operations import kernel as on_triton
from fastmeta.executors.fused.operations import serving as triton
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Outcome, Problem

Kernel = cpu.Kernel | on_triton.TritonKernel


def declines(problem: Problem, recipe: Recipe, low_memory: bool = False) -> str | None:
    """Why this problem can't be served by a kernel for its device; None where it can."""
    problem, device = problem.read, problem.task_weights.device
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {device}"
    if on_cpu(device):
        if extension() is None:
            return "the compiled extension is not there; `python -m fastmeta info` says why"
        why = serving.declines(problem, recipe)
        return why or (cpu.grows(problem, recipe) if low_memory else None)
    why = serving.declines(problem, recipe)
    if why is not None:
        return why
    not_cuda = _not_cuda(problem, recipe)
    not_triton = not_cuda and triton.declines(problem, recipe, low_memory)
    if not_cuda and not_triton:
        return f"{not_cuda}; {not_triton}"
    return None


def kernel_for(
    problem: Problem, recipe: Recipe, low_memory: bool = False, like: Kernel | None = None
) -> Kernel:
    """The kernel for this problem's device, sizes and options; `declines` must have found none.

    `like`: on a GPU, of the engine of that one, which serves a larger problem.
    """
    problem = problem.read
    if on_cpu(problem.task_weights.device):
        return cpu.kernel(problem, recipe, low_memory)
    to_triton = isinstance(like, on_triton.TritonKernel) or (
        like is None and _not_cuda(problem, recipe) is not None
    )
    if to_triton:
        return on_triton.kernel(problem, recipe)
    return cuda.kernel(problem, recipe, low_memory)


def like(problem: Problem, recipe: Recipe, low_memory: bool, other: Kernel) -> Kernel:
    """The kernel for a recipe that differs from another kernel's in numbers alone."""
    if type(other) is cpu.Kernel:
        return other.at(recipe)
    return kernel_for(problem, recipe, low_memory, other)


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing.

    **Raises** `WrongLabel`, before anything is computed, where labels can be looked at.
    """
    return problem.completed(_run(problem.read, kernel))


def _run(problem: Problem, kernel: Kernel) -> Outcome:
    if isinstance(kernel, on_triton.TritonKernel):
        return kernel.run(problem)
    if isinstance(kernel, cuda.CudaKernel):
        return cuda_step.run(problem, kernel)
    return step.run(problem, kernel)


def on_cpu(device: torch.device) -> bool:
    """Return whether tensors there are for the kernels of this processor."""
    return device.type == "cpu" and not cuda.on_host() and not triton_device.on_host()


def _not_cuda(problem: Problem, recipe: Recipe) -> str | None:
    """Why the CUDA kernels don't take a problem of a GPU; None where they do."""
    if triton_device.on_host():
        return "the host plays Triton's device"
    return cuda.declines(problem, recipe)
