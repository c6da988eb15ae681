"""Why the layers' rules, or the compiled step in their place, can't serve a problem."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.executors import packing, triton_device
from fastmeta.executors.extension import extension
from fastmeta.executors.layered.blocks import Blocks
from fastmeta.executors.layered.recipe import INPUT, Recipe
from fastmeta.executors.problem import Problem
from fastmeta.layers import BatchNorm
from fastmeta.tasks import Examples


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why this problem can't be served layer by layer; None where it can."""
    problem = problem.read
    why = packing.declines(problem, recipe.names())
    if why is not None:
        return why
    dtype, device = problem.task_weights.dtype, problem.task_weights.device
    norms = [node.layer for node in recipe.nodes if isinstance(node.layer, BatchNorm)]
    why = packing.declines_buffers(problem, norms, dtype)
    if why is not None:
        return why
    if any(norm.batch_statistics for norm in norms) and problem.tasks.support.weights is not None:
        return "examples are padded, and batch norm would count them"
    for weight in recipe.loss.options.values():
        if isinstance(weight, Tensor) and (weight.dtype != dtype or weight.device != device):
            return f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, problem.differentiate, dtype)
        if why is not None:
            return why
        if examples is not problem.tasks.support or problem.inner.steps:
            _check_statistics(examples, recipe)
    return None


def not_compiled(problem: Problem, recipe: Recipe, low_memory: bool) -> str | None:
    """Why the compiled step can't take what the rules can; None where it does."""
    network = recipe.blocks
    if isinstance(network, str):
        return network
    if extension() is None:
        return "the compiled extension is not there; `python -m fastmeta info` says why"
    if problem.task_weights.device.type != "cpu":
        return f"parameters are on {problem.task_weights.device}"
    if triton_device.on_host():
        return "the host plays Triton's device"
    why = network.loss.declines(problem, network.blocks[-1].filters, problem.task_weights.dtype)
    if why is not None:
        return why
    inner = problem.inner
    if problem.keep_adapted and problem.differentiate:
        return "adapted parameters and a meta-gradient are asked for"
    if low_memory and problem.differentiate and inner.steps > 1 and not inner.first_order:
        return "memory='low' asks for memory flat in K, and it keeps every inner step's activations"
    for examples in problem.tasks.sets():
        why = _not_compiled_examples(examples, network)
        if why is not None:
            return why
    return None


def _declines_examples(examples: Examples, differentiate: bool, dtype: torch.dtype) -> str | None:
    x, y = examples.inputs, examples.targets
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "inputs or targets are trees"
    if differentiate and (x.requires_grad or y.requires_grad):
        return "inputs or targets require grad"
    if x.dtype != dtype:
        return f"inputs are {x.dtype}, parameters {dtype}"
    if y.is_floating_point() and y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if x.shape[1:].numel() == 0:
        return "a set is empty"
    return None


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


def _not_compiled_examples(examples: Examples, network: Blocks) -> str | None:
    x, y = examples.inputs, examples.targets
    if tuple(x.shape[2:]) != network.blocks[0].image:
        return "inputs are not one image an example"
    if network.loss.of_classes and not y.is_floating_point():
        return None if y.dim() == 2 else "labels are not one an example"
    if not y.is_floating_point():
        return f"targets are {y.dtype}"
    if tuple(y.shape[2:]) != (network.blocks[-1].filters,):
        return "targets are not one row an example"
    return None
