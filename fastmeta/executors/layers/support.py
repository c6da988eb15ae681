"""The problems that can't be computed layer by layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.base import NotSupported
from fastmeta.executors.layers.lowering import INPUT, Lowered
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import BatchNorm, Foreign
from fastmeta.tasks import Examples


def check(problem: Problem, lowered: Lowered) -> None:
    """**Raises** `NotSupported` for a problem that can't be computed layer by layer."""
    dtype, device = packing.check(problem, lowered.names()), problem.task_weights.device
    norms = [node.layer for node in lowered.nodes if isinstance(node.layer, BatchNorm)]
    packing.check_buffers(problem, norms, dtype)
    _check_foreign(problem, lowered)
    mixing = [node for node in lowered.nodes if node.layer.mixes_examples]
    if mixing and problem.tasks.support.weights is not None:
        raise NotSupported(f"examples are padded, and {mixing[0].name} would count them")
    losses = [loss for loss in (lowered.loss, lowered.query_loss) if loss is not None]
    for weight in (value for loss in losses for value in loss.options.values()):
        if isinstance(weight, Tensor) and (weight.dtype != dtype or weight.device != device):
            raise NotSupported(
                f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
            )
    readers = [node.layer for node in lowered.nodes if INPUT in node.inputs]
    for examples in problem.tasks.sets():
        x = examples.inputs
        by_torch = all(isinstance(layer, Foreign) for layer in readers)
        integers = isinstance(x, Tensor) and not x.is_floating_point() and by_torch
        packing.check_inputs(examples, problem.differentiate, x.dtype if integers else dtype)
    for loss, examples in zip(
        (lowered.loss, lowered.query_loss), problem.tasks.sets(), strict=False
    ):
        if loss is not None:
            packing.check_targets(examples, dtype)
    for examples in problem.tasks.sets():
        if examples is not problem.tasks.support or problem.inner.steps:
            _check_statistics(examples, lowered)


def _check_foreign(problem: Problem, lowered: Lowered) -> None:
    """**Raises** `NotSupported` where a layer reads a buffer that is learned or lies elsewhere."""
    module, device = problem.model.module, problem.task_weights.device
    for node in lowered.nodes:
        for name in node.layer.buffers if isinstance(node.layer, Foreign) else ():
            buffer = module.get_buffer(name)
            if buffer.requires_grad or buffer.device != device:
                raise NotSupported(f"{node.name} reads {name}, no constant on {device}")


def _check_statistics(examples: Examples, lowered: Lowered) -> None:
    """One number has no variance: **raises** what torch raises."""
    if examples.count > 1:
        return
    for node in lowered.nodes:
        layer = node.layer
        if not isinstance(layer, BatchNorm) or not layer.batch_statistics:
            continue
        (source,) = node.inputs
        shape = examples.inputs.shape[2:] if source == INPUT else node.shape
        zeros = examples.inputs.new_zeros(1, *shape)
        F.batch_norm(zeros, None, None, training=True)
