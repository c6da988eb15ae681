"""One call of the fused step on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmeta.executors import call, rates, update_rule
from fastmeta.executors.fused.front import Front, Passed, by_values
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.fused.lowering import Lowered
from fastmeta.executors.fused.own_loss import OwnLoss
from fastmeta.executors.kernel_loss import KernelLoss
from fastmeta.executors.problem import FormUnavailable, Outcome, Problem, WrongLabel
from fastmeta.network.layers import Dropout
from fastmeta.tasks import Examples


def run(problem: Problem, kernel: Kernel, front: Front | None = None) -> Outcome:
    """Computes the step; an offer was made for its sizes.

    **Raises** `WrongLabel`, before anything is computed.
    """
    if front is None:
        return _run(problem, kernel)
    passed = Passed.over(front, problem)
    behind = passed.behind()
    flows = by_values(behind) if front.flows(problem) else []
    outcome = _run(behind, kernel, flows)
    if front.divided is not None:
        outcome = front.divided.complete(problem, behind, outcome)
    return passed.complete(outcome, flows) if flows else outcome


def _run(problem: Problem, kernel: Kernel, flows: Sequence[Tensor] = ()) -> Outcome:
    """Computes the step; the derivatives by the inputs of each set go into `flows`."""
    tasks, lowered = problem.tasks, kernel.lowered
    support, query = tasks.per_step or tasks.support, tasks.query
    own = own_inputs(problem, lowered, (support, query))
    before = torch.get_rng_state() if kernel.draws else None
    try:
        return call.run(
            problem,
            kernel,
            packed_rates(problem, kernel),
            arrays(support, lowered.loss),
            arrays(query, lowered.query_loss),
            update_rule.describe(problem.inner, problem.differentiate).options,
            own,
            masks(problem, kernel),
            flows,
        )
    except WrongLabel:
        if before is not None:  # nothing has been computed, so nothing is drawn
            torch.set_rng_state(before)
        raise


def own_inputs(
    problem: Problem, lowered: Lowered, sets: tuple[Examples | None, ...]
) -> call.OwnInputs | None:
    """The tensors that losses by formula read; None where no loss is one."""
    losses = (lowered.loss, lowered.query_loss)
    if not any(isinstance(loss, OwnLoss) for loss in losses):
        return None
    given: list[call.Given] = []
    learned: list[Tensor] = []
    for loss, examples, captured in zip(losses, sets, problem.captured, strict=True):
        given.append([])
        if isinstance(loss, OwnLoss):
            learned += loss.learned(captured)
            if examples is not None:
                given[-1] = loss.given(examples, captured, problem.task_weights)
    return call.OwnInputs(given[0], given[1], learned)


def masks(problem: Problem, kernel: Kernel) -> tuple[call.Given, call.Given]:
    """The masks of dropout in every support and every query pass, by layer.

    They are drawn task by task and pass by pass, in the order of the loop over tasks.
    """
    if not kernel.draws:
        return [], []
    tasks, steps = problem.tasks, problem.inner.steps
    for examples in tasks.sets():
        if not examples.inputs[0].is_contiguous():
            raise FormUnavailable("dropout fills a mask in the order of inputs that are no rows")
    support = _undrawn(problem, kernel, steps, tasks.support.count)
    query = _undrawn(
        problem, kernel, sum(kernel.evaluates), tasks.query.count if tasks.query else 0
    )
    of_support, of_query = _by_pass(support), _by_pass(query)
    for _ in range(tasks.tasks):
        for step, evaluates in enumerate(kernel.evaluates):
            if evaluates:
                _draw(next(of_query))
            if step < steps:
                _draw(next(of_support))
    for masks in (support, query):
        for dropout, mask in masks.values():
            mask.div_(1 - dropout.p)
    return _by_layer(kernel, support), _by_layer(kernel, query)


_Masks = dict[int, tuple[Dropout, Tensor]]
"""By layer, its dropout and the masks `[T, passes, N, H]`."""


def _undrawn(problem: Problem, kernel: Kernel, passes: int, count: int) -> _Masks:
    make, tasks = problem.task_weights.new_empty, problem.tasks.tasks
    return {
        i: (layer.dropout, make(tasks, passes, count, layer.outputs))
        for i, layer in enumerate(kernel.lowered.layers)
        if layer.dropout
    }


def _by_pass(masks: _Masks) -> Iterator[list[tuple[Dropout, Tensor]]]:
    """The masks `[N, H]` of all layers in each pass of each task."""
    each = [mask.flatten(0, 1).unbind(0) for _, mask in masks.values()]
    drawing = [dropout for dropout, _ in masks.values()]
    for of_layers in zip(*each, strict=True):
        yield [*zip(drawing, of_layers, strict=True)]


def _draw(masks: list[tuple[Dropout, Tensor]]) -> None:
    for dropout, mask in masks:
        dropout.draw(mask)


def _by_layer(kernel: Kernel, masks: _Masks) -> call.Given:
    """The masks of each layer, with the distance between two tasks' own; of some there are none."""
    nothing = next(iter(masks.values()))[1]
    found = [masks[i][1] if i in masks else nothing for i in range(len(kernel.lowered.layers))]
    return [(mask, mask[0].numel()) for mask in found]


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
    if isinstance(loss, OwnLoss):
        return [x, None, None, None, None]
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
