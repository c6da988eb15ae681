"""One call of the fused step on the CPU."""

from __future__ import annotations

from torch import Tensor

from fastmeta.executors import call, rates, update_rule
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.kernel_loss import KernelLoss
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Examples


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; an offer was made for its sizes.

    **Raises** `WrongLabel`, before anything is computed.
    """
    tasks, lowered = problem.tasks, kernel.lowered
    return call.run(
        problem,
        kernel,
        packed_rates(problem, kernel),
        arrays(tasks.per_step or tasks.support, lowered.loss),
        arrays(tasks.query, lowered.query_loss),
        update_rule.describe(problem.inner, problem.differentiate).options,
    )


def packed_rates(problem: Problem, kernel: Kernel) -> Tensor:
    """The learning rates, `[K, tensors]`, or `[K, P]` if elementwise."""
    inner, weights = problem.inner, problem.task_weights
    rate = kernel.one_rate(inner, weights)
    if rate is not None:
        return rate
    return rates.packed(inner, problem.model.all_parameters(), kernel.names, weights)


def arrays(examples: Examples | None, loss: KernelLoss) -> list[Tensor | None]:
    """Inputs, targets, labels, example weights and the loss's weights."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if loss.weighted:
        y, factors = loss.weigh(y.detach())
    floating = y.is_floating_point()
    return [
        x,
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype),
        factors,
    ]
