"""Why the convolutional kernels can't serve a problem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.extension import extension
from fastmeta.executors.layered.chain import Chain
from fastmeta.executors.problem import Problem
from fastmeta.tasks import Examples


def declines(problem: Problem, chain: Chain) -> str | None:
    """Why this problem can't be served by the chain's kernels; None where it can."""
    if extension() is None:
        return "the compiled extension is not there; `python -m fastmeta info` says why"
    why = packing.declines(problem, [name for name in chain.names() if name])
    if why is not None:
        return why
    dtype = problem.task_weights.dtype
    norms = [block.norm for block in chain.blocks]
    why = packing.declines_buffers(problem, norms, dtype) or chain.loss.declines(
        problem, chain.blocks[-1].filters, dtype
    )
    if why is not None:
        return why
    if problem.keep_adapted and problem.differentiate:
        return "adapted parameters and a meta-gradient are asked for"
    _check_batches(problem, chain)
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, chain, dtype, problem.differentiate)
        if why is not None:
            return why
    return None


def grows(problem: Problem) -> str | None:
    """What keeps the kernels from being flat in K; None where there is nothing to keep."""
    inner = problem.inner
    if not problem.differentiate or inner.steps <= 1 or inner.first_order:
        return None
    return "memory='low' asks for memory flat in K, and every inner step's activations are kept"


def _check_batches(problem: Problem, chain: Chain) -> None:
    """One number has no variance: **raises** what torch raises."""
    for block in chain.blocks:
        if block.norm is None or not block.norm.batch_statistics:
            continue
        for examples in problem.tasks.sets():
            read = examples is not problem.tasks.support or problem.inner.steps
            if read and _fewest(examples) * block.pixels == 1:
                like = problem.task_weights.new_zeros(1, block.filters, 1, 1)
                F.batch_norm(like, None, None, training=True)


def _fewest(examples: Examples) -> int:
    """Real ones of a task."""
    return examples.count if examples.weights is None else int((examples.weights > 0).sum(1).min())


def _declines_examples(
    examples: Examples, chain: Chain, dtype: torch.dtype, differentiate: bool
) -> str | None:
    x, y = examples.inputs, examples.targets
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "inputs or targets are trees"
    if differentiate and (x.requires_grad or y.requires_grad):
        return "inputs or targets require grad"
    if x.dtype != dtype:
        return f"inputs are {x.dtype}, parameters {dtype}"
    if x.shape[1] == 0 or tuple(x.shape[2:]) != chain.blocks[0].image:
        return "inputs are not one image an example"
    if chain.loss.of_classes and not y.is_floating_point():
        return None if y.dim() == 2 else "labels are not one an example"
    if y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if tuple(y.shape[2:]) != (chain.blocks[-1].filters,):
        return "targets are not one row an example"
    return None
