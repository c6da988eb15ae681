"""Why the fused kernels can't serve a problem."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Problem
from fastmeta.tasks import Examples


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why this problem can't be served by any kernel for the recipe; None where it can."""
    device = problem.task_weights.device
    why = packing.declines(problem, [name for name in recipe.names() if name])
    if why is not None:
        return why
    dtype = problem.task_weights.dtype
    why = packing.declines_buffers(problem, recipe.norms(), dtype) or recipe.loss.declines(
        problem, recipe.layers[-1].outputs, dtype
    )
    if why is not None:
        return why
    if problem.tasks.support.weights is not None and any(
        norm is not None and norm.batch_statistics for norm in recipe.norms()
    ):
        return "padded examples would count in the statistics of a batch norm"
    _check_batches(problem, recipe)
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, recipe, dtype, device, problem.differentiate)
        if why is not None:
            return why
    return None


def _check_batches(problem: Problem, recipe: Recipe) -> None:
    """One example has no variance: **raises** what torch raises."""
    normed = [n for n in recipe.layers if n.norm is not None and n.norm.batch_statistics]
    for examples in problem.tasks.sets() if normed else ():
        if examples.count == 1 and (examples is not problem.tasks.support or problem.inner.steps):
            like = problem.task_weights.new_zeros(1, normed[0].outputs)
            F.batch_norm(like, None, None, training=True)


def _declines_examples(
    examples: Examples, recipe: Recipe, dtype: torch.dtype, device: torch.device,
    differentiate: bool,
) -> str | None:  # fmt: skip
    x, y = examples.inputs, examples.targets
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "inputs or targets are trees"
    if differentiate and (x.requires_grad or y.requires_grad):
        return "inputs or targets require grad"
    if x.dtype != dtype:
        return f"inputs are {x.dtype}, parameters {dtype}"
    if x.device != device or y.device != device:
        return f"inputs are on {x.device}, targets on {y.device}, parameters on {device}"
    if x.shape[1] == 0 or math.prod(x.shape[2:]) != recipe.layers[0].inputs:
        return "inputs are not one row an example"
    if recipe.loss.of_classes and not y.is_floating_point():
        return None if y.dim() == 2 else "labels are not one an example"
    if y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if tuple(y.shape[2:]) != (recipe.layers[-1].outputs,):
        return "targets are not one row an example"
    return None
