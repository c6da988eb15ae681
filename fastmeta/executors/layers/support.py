"""The problems that can't be computed layer by layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.base import NotSupported
from fastmeta.executors.layers.lowering import INPUT, Recipe
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import BatchNorm
from fastmeta.tasks import Examples


def check(problem: Problem, recipe: Recipe) -> None:
    """**Raises** `NotSupported` for a problem that can't be computed layer by layer."""
    dtype, device = packing.check(problem, recipe.names()), problem.task_weights.device
    norms = [node.layer for node in recipe.nodes if isinstance(node.layer, BatchNorm)]
    packing.check_buffers(problem, norms, dtype)
    if any(norm.batch_statistics for norm in norms) and problem.tasks.support.weights is not None:
        raise NotSupported("examples are padded, and batch norm would count them")
    losses = [loss for loss in (recipe.loss, recipe.query_loss) if loss is not None]
    for weight in (value for loss in losses for value in loss.options.values()):
        if isinstance(weight, Tensor) and (weight.dtype != dtype or weight.device != device):
            raise NotSupported(
                f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
            )
    for examples in problem.tasks.sets():
        packing.check_inputs(examples, problem.differentiate, dtype)
    for loss, examples in zip((recipe.loss, recipe.query_loss), problem.tasks.sets(), strict=False):
        if loss is not None:
            packing.check_targets(examples, dtype)
    for examples in problem.tasks.sets():
        if examples is not problem.tasks.support or problem.inner.steps:
            _check_statistics(examples, recipe)


def _check_statistics(examples: Examples, recipe: Recipe) -> None:
    """One number has no variance: **raises** what torch raises."""
    if examples.count > 1:
        return
    for node in recipe.nodes:
        layer = node.layer
        if not isinstance(layer, BatchNorm) or not layer.batch_statistics:
            continue
        (source,) = node.inputs
        shape = examples.inputs.shape[2:] if source == INPUT else node.shape
        zeros = examples.inputs.new_zeros(1, *shape)
        F.batch_norm(zeros, None, None, training=True)
