"""The fused step where the tensors are: on the processor, or on a GPU."""

from __future__ import annotations

from fastmeta.executors.fused import cuda, cuda_step, kernel, step
from fastmeta.executors.fused.cuda import CudaKernel
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Outcome, Problem


def kernel_for(problem: Problem, recipe: Recipe, low_memory: bool = False) -> Kernel:
    """The kernel for this problem's sizes and options, on its device."""
    if cuda.takes(problem.task_weights.device):
        return cuda.kernel(problem, recipe, low_memory)
    return kernel.kernel(problem, recipe, low_memory)


def grows(problem: Problem, recipe: Recipe) -> str | None:
    """What keeps the kernel from being flat in K; None where it is.

    On a GPU all that a step keeps lies on the chip, or the kernels decline it.
    """
    if cuda.takes(problem.task_weights.device):
        return None
    return kernel.grows(problem, recipe)


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing."""
    if isinstance(kernel, CudaKernel):
        return cuda_step.run(problem, kernel)
    return step.run(problem, kernel)
