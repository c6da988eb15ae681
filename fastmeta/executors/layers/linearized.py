"""Linearization layer by layer, all tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.executors.layers.lowering import INPUT, Lowered, divide
from fastmeta.executors.layers.passes import GradientRequest, LayerPass
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import Batch
from fastmeta.network.losses.open import OpenLoss
from fastmeta.network.losses.rules import PreparedLoss, prepare
from fastmeta.tasks import map_tensors


@torch.no_grad()
def linearized(problem: Problem, lowered: Lowered, parameters: Tensors) -> Linearized:
    """The network at each task's `parameters`, `[T, ...]`."""
    support, model = problem.tasks.support, problem.model
    named = {**model.all_parameters(), **dict(model.module.named_buffers())}
    shared = {name: tensor.detach().unsqueeze(0) for name, tensor in named.items()}
    batch = Batch(support.tasks, support.count)
    read = [name for name in lowered.names() if name in parameters]
    parts, at = divide(lowered, read, read), {**shared, **parameters}
    given = {INPUT: support.inputs.detach()}
    # No parameter reaches what stands in front.
    border = LayerPass(lowered.nodes, parts.body, at, batch).forward(given, parts.border)
    run, output = LayerPass(lowered.nodes, parts.head, at, batch), lowered.output
    z = run.forward({**given, **border}, [output])[output]
    loss = _loss(problem, lowered, batch, z)
    request = GradientRequest(parts.moving, dict.fromkeys(read, batch.tasks))
    gradients = run.backward({output: loss.gradient(z)}, request).parameters

    @torch.no_grad()
    def product(vectors: Tensors) -> Tensors:
        rz = run.tangent({name: vectors[name] for name in read}, output)
        return run.tangent_backward({output: loss.tangent(z, rz)}, request).parameters

    return Linearized(z, loss.value(z), gradients, product)


def _loss(problem: Problem, lowered: Lowered, batch: Batch, z: Tensor) -> PreparedLoss:
    targets = map_tensors(Tensor.detach, problem.tasks.support.targets)
    if lowered.loss is None:
        return OpenLoss(problem.objective, targets, batch.tasks)
    return prepare(lowered.loss.kind, lowered.loss.options, targets, batch, z)
