"""The problems that the fused kernels can't compute."""

from __future__ import annotations

import math

import torch.nn.functional as F

from fastmeta.executors import packing
from fastmeta.executors.base import NotSupported
from fastmeta.executors.fused.lowering import Lowered
from fastmeta.executors.fused.own_loss import OwnLoss
from fastmeta.executors.problem import Problem


def check(problem: Problem, lowered: Lowered) -> None:
    """**Raises** `NotSupported` for a problem that no kernel for the network can compute."""
    device = problem.task_weights.device
    dtype = packing.check(problem, [name for name in lowered.names() if name])
    packing.check_buffers(problem, lowered.norms(), dtype)
    if problem.tasks.support.weights is not None and any(
        norm is not None and norm.batch_statistics for norm in lowered.norms()
    ):
        raise NotSupported("padded examples would count in the statistics of a batch norm")
    _check_batches(problem, lowered)
    for examples in problem.tasks.sets():
        packing.check_inputs(examples, problem.differentiate, dtype)
        loss = lowered.loss if examples is problem.tasks.support else lowered.query_loss
        x, y = examples.inputs, examples.targets
        if x.device != device:
            raise NotSupported(f"inputs are on {x.device}, parameters on {device}")
        if math.prod(x.shape[2:]) != lowered.layers[0].inputs:
            raise NotSupported("inputs are not one row an example")
        loss.check(problem, examples, lowered.output_shape, dtype)
        if isinstance(loss, OwnLoss):
            continue
        packing.check_targets(examples, dtype)
        if y.device != device:
            raise NotSupported(f"targets are on {y.device}, parameters on {device}")
        packing.check_rows(examples, loss, lowered.output_shape)


def _check_batches(problem: Problem, lowered: Lowered) -> None:
    """One example has no variance: **raises** what torch raises."""
    normed = [n for n in lowered.layers if n.batch_norm and n.batch_norm.batch_statistics]
    for examples in problem.tasks.sets() if normed else ():
        if examples.count == 1 and (examples is not problem.tasks.support or problem.inner.steps):
            like = problem.task_weights.new_zeros(1, normed[0].outputs)
            F.batch_norm(like, None, None, training=True)
