"""Linearization layer by layer, all tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.executors.layers.lowering import INPUT, Recipe, divide
from fastmeta.executors.layers.passes import Ask, LayerPass
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import Batch
from fastmeta.network.losses.open import OpenLoss
from fastmeta.network.losses.rules import PreparedLoss, prepare
from fastmeta.tasks import map_tensors


@torch.no_grad()
def linearized(problem: Problem, recipe: Recipe, parameters: Tensors) -> Linearized:
    """The network at each task's `parameters`, `[T, ...]`."""
    support, model = problem.tasks.support, problem.model
    named = {**model.all_parameters(), **dict(model.module.named_buffers())}
    shared = {name: tensor.detach().unsqueeze(0) for name, tensor in named.items()}
    batch = Batch(support.tasks, support.count)
    read = [name for name in recipe.names() if name in parameters]
    parts, at = divide(recipe, read, read), {**shared, **parameters}
    given = {INPUT: support.inputs.detach()}
    # No parameter reaches what stands in front.
    border = LayerPass(recipe.nodes, parts.body, at, batch).forward(given, parts.border)
    run, output = LayerPass(recipe.nodes, parts.head, at, batch), recipe.output
    z = run.forward({**given, **border}, [output])[output]
    loss = _loss(problem, recipe, batch, z)
    ask = Ask(parts.moving, dict.fromkeys(read, batch.tasks))
    gradients = run.backward({output: loss.gradient(z)}, ask).parameters

    @torch.no_grad()
    def product(vectors: Tensors) -> Tensors:
        rz = run.tangent({name: vectors[name] for name in read}, output)
        return run.tangent_backward({output: loss.tangent(z, rz)}, ask).parameters

    return Linearized(z, loss.value(z), gradients, product)


def _loss(problem: Problem, recipe: Recipe, batch: Batch, z: Tensor) -> PreparedLoss:
    targets = map_tensors(Tensor.detach, problem.tasks.support.targets)
    if recipe.loss is None:
        return OpenLoss(problem.objective, targets, batch.tasks)
    return prepare(recipe.loss.kind, recipe.loss.options, targets, batch, z)
