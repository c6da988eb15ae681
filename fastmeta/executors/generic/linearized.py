"""Linearization task by task, on autograd's tape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Problem
from fastmeta.tasks import detached, map_tensors, stacked, unstack


def linearized(problem: Problem, parameters: Tensors) -> Linearized:
    """The model at each task's `parameters`, `[T, ...]`; keeps the graph of every task."""
    support, tasks = problem.tasks.support, problem.tasks.tasks
    sets = zip(
        unstack(map_tensors(Tensor.detach, support.inputs), tasks),
        unstack(map_tensors(Tensor.detach, support.targets), tasks),
        strict=True,
    )
    points: list[Tensors] = []
    graphs: list[Tensors] = []
    outputs, losses = [], []
    with torch.enable_grad():
        for task, (inputs, targets) in enumerate(sets):
            point = {name: p[task].detach().requires_grad_() for name, p in parameters.items()}
            output = problem.model(point, inputs, problem.model.scratch())
            loss = problem.objective(output, targets, None)
            found: Any = torch.autograd.grad(
                loss, [*point.values()], create_graph=True, allow_unused=True
            )
            points.append(point)
            graphs.append({n: g for n, g in zip(point, found, strict=True) if g is not None})
            outputs.append(detached(output))
            losses.append(loss.detach())

    def product(vectors: Tensors) -> Tensors:
        each = [_product(graphs[i], points[i], vectors, i) for i in range(tasks)]
        return {name: torch.stack([one[name] for one in each]) for name in parameters}

    gradients = {
        name: torch.stack(
            [_or_zero(g.get(name), p[name]) for g, p in zip(graphs, points, strict=True)]
        )
        for name in parameters
    }
    return Linearized(stacked(outputs), torch.stack(losses), gradients, product)


def _product(gradients: Tensors, point: Tensors, vectors: Tensors, task: int) -> Tensors:
    """One task's Hessian times its vector."""
    curved = {name: g for name, g in gradients.items() if g.requires_grad}
    if not curved:
        return {name: torch.zeros_like(p) for name, p in point.items()}
    found = torch.autograd.grad(
        [*curved.values()],
        [*point.values()],
        [vectors[name][task].to(g.dtype) for name, g in curved.items()],
        retain_graph=True,
        allow_unused=True,
    )
    return {n: _or_zero(g, p) for (n, p), g in zip(point.items(), found, strict=True)}


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value.detach()
