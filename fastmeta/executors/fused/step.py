"""One call of the compiled step: addresses in, losses and gradients out."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.executors import packing, rates
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.packing import WrongLabel, address, readable
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Examples


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing.

    **Raises** `WrongLabel`, before anything is computed.
    """
    inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
    step, recipe, names = kernel.step, kernel.recipe, kernel.names
    named = problem.model.all_parameters()
    parameters = [None if n is None else readable(named[n]) for n in names]
    rate = kernel.one_rate(inner, weights)
    if rate is None:
        rate = rates.packed(inner, named, names, weights)
    statistics = packing.statistics(problem, [layer.norm for layer in recipe.layers])
    support, query = arrays(tasks.support, recipe), arrays(tasks.query, recipe)
    count, size = tasks.tasks, tasks.query.count if tasks.query else 0
    step_losses = weights.new_zeros(inner.steps + 1, count)
    support_losses = weights.new_empty(inner.steps, count)
    outputs = weights.new_empty(count, size, recipe.layers[-1].outputs)
    gradient = weights.new_empty(step.gradients if problem.differentiate else 0)
    adapted = {
        name: weights.new_empty(count, *named[name].shape)
        for name in (inner.adapted if problem.keep_adapted else ())
    }
    task_weights = readable(weights)
    computed = step.run(
        count,
        [address(p) for p in parameters],
        [address(adapted.get(name or "")) for name in names] if adapted else [],
        [address(t) for t in statistics],
        rate.data_ptr(),
        inner.step_weights,
        kernel.evaluates,
        task_weights.data_ptr(),
        [address(t) for t in support],
        [address(t) for t in query],
        support_losses.data_ptr(),
        step_losses.data_ptr(),
        outputs.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    if not computed:
        raise WrongLabel
    outcome = Outcome(
        step_losses, support_losses, outputs if tasks.query else None, adapted=adapted
    )
    if problem.differentiate:
        outcome.gradients = packing.gradients(problem, names, gradient)
    return outcome


def arrays(examples: Examples | None, recipe: Recipe) -> list[Tensor | None]:
    """Inputs, targets, labels, example weights and the loss's weights."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if recipe.loss.weighted:
        y, factors = recipe.loss.weigh(y.detach())
    y = readable(y)
    floating = y.is_floating_point()
    return [
        readable(x),
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype).contiguous(),
        factors,
    ]
