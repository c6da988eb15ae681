"""Why the fused kernels can't serve a problem."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import BatchNorm1d

from fastmeta.executors.fused.kernel import extension
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Problem
from fastmeta.tasks import Examples

_DTYPES = (torch.float32, torch.float64)


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why this problem can't be served by the recipe's kernels; None where it can."""
    if extension() is None:
        return "the compiled extension is not there; `python -m fastmeta info` says why"
    named = problem.model.all_parameters()
    used = [name for layer in recipe.layers for name in layer.tensors() if name]
    if any(name not in named for name in used):
        return "a layer's weight is a buffer"
    dtype = named[used[0]].dtype
    if dtype not in _DTYPES:
        return f"parameters are {dtype}, not float32 or float64"
    for name in used:
        if named[name].device.type != "cpu":
            return f"parameters are on {named[name].device}"
        if named[name].dtype != dtype:
            return "parameters are of different dtypes"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    why = _declines_buffers(problem, recipe, dtype) or _declines_weights(problem, recipe, dtype)
    if why is not None:
        return why
    if any(name not in used for name in problem.inner.adapted):
        return "a parameter adapts that no layer reads"
    if problem.task_weights.dtype != dtype:
        return "task_weights are of another dtype than the parameters"
    if problem.tasks.support.weights is not None and any(
        layer.norm is not None and layer.norm.batch_statistics for layer in recipe.layers
    ):
        return "padded examples would count in the statistics of a batch norm"
    _check_batches(problem, recipe)
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, recipe, dtype, problem.differentiate)
        if why is not None:
            return why
    return None


def _declines_buffers(problem: Problem, recipe: Recipe, dtype: torch.dtype) -> str | None:
    """Running statistics may be written, because every pass's are thrown away; nothing else."""
    module = problem.model.module
    written = set(problem.model.written)
    for layer in recipe.layers:
        if layer.norm is None:
            continue
        statistics = [name for name in (layer.norm.mean, layer.norm.variance) if name]
        written.difference_update(statistics)
        if layer.norm.batch_statistics:
            continue
        buffers = dict(module.named_buffers())
        for name in statistics:
            if name not in buffers or buffers[name].requires_grad:
                return "running statistics are no constant buffers"
            if buffers[name].dtype != dtype or buffers[name].device.type != "cpu":
                return f"running statistics are {buffers[name].dtype}, parameters {dtype}"
    for name in list(written):
        owner, _, counter = name.rpartition(".")
        if counter == "num_batches_tracked" and type(module.get_submodule(owner)) is BatchNorm1d:
            written.remove(name)
    return "a forward pass writes buffers" if written else None


def _check_batches(problem: Problem, recipe: Recipe) -> None:
    """One example has no variance: **raises** what torch raises."""
    normed = [n for n in recipe.layers if n.norm is not None and n.norm.batch_statistics]
    for examples in problem.tasks.sets() if normed else ():
        if examples.count == 1 and (examples is not problem.tasks.support or problem.inner.steps):
            like = problem.task_weights.new_zeros(1, normed[0].outputs)
            F.batch_norm(like, None, None, training=True)


def _declines_examples(
    examples: Examples, recipe: Recipe, dtype: torch.dtype, differentiate: bool
) -> str | None:
    x, y = examples.inputs, examples.targets
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "inputs or targets are trees"
    if differentiate and (x.requires_grad or y.requires_grad):
        return "inputs or targets require grad"
    if x.dtype != dtype:
        return f"inputs are {x.dtype}, parameters {dtype}"
    if x.shape[1] == 0 or math.prod(x.shape[2:]) != recipe.layers[0].inputs:
        return "inputs are not one row an example"
    if recipe.loss == 0 and not y.is_floating_point():
        return None if y.dim() == 2 else "labels are not one an example"
    if y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if tuple(y.shape[2:]) != (recipe.layers[-1].outputs,):
        return "targets are not one row an example"
    return None


def _declines_weights(problem: Problem, recipe: Recipe, dtype: torch.dtype) -> str | None:
    outputs = recipe.layers[-1].outputs
    for weight in (recipe.weight, recipe.pos_weight):
        if weight is None:
            continue
        if weight.dtype != dtype or weight.device.type != "cpu":
            return f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
        if recipe.loss == 0:
            continue  # torch has refused what is not one number a class
        for examples in problem.tasks.sets():
            row = (examples.count, outputs)
            try:
                fits = torch.broadcast_shapes(weight.shape, row) == row
            except RuntimeError:
                fits = False
            if not fits:
                return f"the loss's weights {list(weight.shape)} don't broadcast to {list(row)}"
    return None
