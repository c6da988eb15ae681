"""One call of the fused step on the CPU."""

from __future__ import annotations

from torch import Tensor

from fastmeta.executors import call, rates
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.fused.lowering import Recipe
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Examples


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing.

    **Raises** `WrongLabel`, before anything is computed.
    """
    tasks, recipe = problem.tasks, kernel.recipe
    return call.run(
        problem,
        kernel,
        packed_rates(problem, kernel),
        arrays(tasks.support, recipe),
        arrays(tasks.query, recipe),
    )


def packed_rates(problem: Problem, kernel: Kernel) -> Tensor:
    """The learning rates, `[K, tensors]`, or `[K, P]` if elementwise."""
    inner, weights = problem.inner, problem.task_weights
    rate = kernel.one_rate(inner, weights)
    if rate is not None:
        return rate
    return rates.packed(inner, problem.model.all_parameters(), kernel.names, weights)


def arrays(examples: Examples | None, recipe: Recipe) -> list[Tensor | None]:
    """Inputs, targets, labels, example weights and the loss's weights."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if recipe.loss.weighted:
        y, factors = recipe.loss.weigh(y.detach())
    floating = y.is_floating_point()
    return [
        x,
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype),
        factors,
    ]
