"""One call of the compiled convolutional step: addresses in, losses and gradients out."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import packing, rates
from fastmeta.executors.extension import extension
from fastmeta.executors.layered.chain import Chain
from fastmeta.executors.packing import WrongLabel, address, readable
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Examples


@dataclass(frozen=True, eq=False)
class Kernel:
    """What is the same in every call for a chain, sizes and options."""

    chain: Chain
    step: Any
    """The compiled step."""
    names: tuple[str | None, ...]
    """Of its tensors: weight, bias, scale and shift of each block."""
    evaluates: tuple[bool, ...]
    """Whether the query loss after each number of steps is asked for."""


def kernel(problem: Problem, chain: Chain) -> Kernel:
    """The kernel for this problem's sizes and options."""
    inner, tasks = problem.inner, problem.tasks
    step = _step(
        chain,
        inner.adapted,
        (tasks.support.count, tasks.query.count if tasks.query else 0, inner.steps),
        (
            problem.differentiate,
            inner.first_order,
            rates.elementwise(inner),
            problem.differentiate and bool(inner.learned_rates()),
        ),
        inner.prox,
        problem.task_weights.dtype == torch.float64,
        os.environ.get("FASTMETA_ISA", ""),
    )
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    return Kernel(chain, step, chain.names(), evaluates)


@functools.lru_cache(maxsize=256)
def _step(
    chain: Chain, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, isa: str,
) -> Any:  # fmt: skip
    module = extension()
    assert module is not None
    blocks = [
        (
            (*block.image, block.filters), block.kernel, block.stride, block.padding,
            block.dilation,
            0 if block.norm is None else 1 if block.norm.batch_statistics else 2,
            block.norm.eps if block.norm else 0.0,
            1.0 if block.below is None else block.below,
            block.window, block.mean,
            [name is not None for name in block.tensors()],
            [name in adapted for name in block.tensors()],
        )
        for block in chain.blocks
    ]  # fmt: skip
    loss = chain.loss
    return module.ConvStep(
        blocks, loss.kind, loss.option, loss.ignore_index, loss.weighted, *sizes, *flags, prox,
        is_double, isa,
    )  # fmt: skip


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing.

    **Raises** `WrongLabel`, before anything is computed.
    """
    inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
    chain, names, step = kernel.chain, kernel.names, kernel.step
    named = problem.model.all_parameters()
    parameters = [None if n is None else readable(named[n]) for n in names]
    statistics = packing.statistics(problem, [block.norm for block in chain.blocks])
    rate = rates.packed(inner, named, names, weights)
    support, query = _arrays(tasks.support, chain), _arrays(tasks.query, chain)
    count, size = tasks.tasks, tasks.query.count if tasks.query else 0
    step_losses = weights.new_zeros(inner.steps + 1, count)
    support_losses = weights.new_empty(inner.steps, count)
    outputs = weights.new_zeros(count, size, chain.blocks[-1].filters)  # padding has none
    gradient = weights.new_empty(step.gradients)
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


def _arrays(examples: Examples | None, chain: Chain) -> list[Tensor | None]:
    """Inputs, targets, labels, the loss's weights, and how many examples of each task are real."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if chain.loss.weighted:
        y, factors = chain.loss.weigh(y.detach())
    y = readable(y)
    floating = y.is_floating_point()
    counts = None if weights is None else (weights > 0).sum(1)  # padding comes last
    return [readable(x), y if floating else None, None if floating else y, factors, counts]
