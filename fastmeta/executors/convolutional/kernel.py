"""One call of the compiled convolutional step: addresses in, losses and gradients out."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import call, rates, update_rule
from fastmeta.executors.convolutional.blocks import Blocks
from fastmeta.executors.extension import extension
from fastmeta.executors.kernel_loss import KernelLoss
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.executors.programs import of_activation
from fastmeta.network.layers import BatchNorm
from fastmeta.tasks import Examples


@dataclass(frozen=True, eq=False)
class Kernel:
    """The part of a call that network, sizes and options decide."""

    network: Blocks
    step: Any
    """The compiled step."""
    names: tuple[str | None, ...]
    """The names of its tensors: weight, bias, scale and shift of each block."""
    evaluates: tuple[bool, ...]
    """By number of steps, True where the query loss after them is asked for."""
    norms: tuple[BatchNorm | None, ...]
    """The batch norm of each block."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of an example's prediction."""
        return (self.network.blocks[-1].filters,)

    @property
    def body_flops(self) -> int:
        """The FLOP of an example's forward pass through the blocks that are run once."""
        return sum(block.flops for block in self.network.blocks[: self.step.body])


def kernel(problem: Problem, network: Blocks) -> Kernel:
    """The kernel for this problem's sizes and options."""
    inner, tasks = problem.inner, problem.tasks
    step = _step(
        network,
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
        update_rule.describe(inner, problem.differentiate).description,
        tasks.per_step is not None,
    )
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    return Kernel(network, step, network.names(), evaluates, network.norms())


@functools.lru_cache(maxsize=256)
def _step(
    network: Blocks, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, isa: str,
    rule: update_rule.Description, per_step_support: bool,
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
            (block.source, -1 if block.plus is None else block.plus),
        )
        for block in network.blocks
    ]  # fmt: skip
    made = [block.expression and of_activation(block.expression) for block in network.blocks]
    expressions = [
        (each[0], each[1], each[2] if block.chooses else None) if each else (None, None, None)
        for block, each in zip(network.blocks, made, strict=True)
    ]
    return module.ConvStep(
        blocks, *_described(network.loss), *sizes, *flags, prox, is_double, isa, rule,
        per_step_support, _described(network.query_loss), expressions,
    )  # fmt: skip


def _described(loss: KernelLoss) -> tuple[int, float, int, bool]:
    return loss.kind, loss.option, loss.ignore_index, loss.weighted


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; an offer was made for its sizes.

    **Raises** `WrongLabel`, before anything is computed.
    """
    inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
    network = kernel.network
    return call.run(
        problem,
        kernel,
        rates.packed(inner, problem.model.all_parameters(), kernel.names, weights),
        _arrays(tasks.per_step or tasks.support, network.loss),
        _arrays(tasks.query, network.query_loss),
        update_rule.describe(inner, problem.differentiate).options,
    )


def _arrays(examples: Examples | None, loss: KernelLoss) -> list[Tensor | None]:
    """Inputs, targets, labels, the loss's weights, and how many examples of each task are real."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if loss.weighted:
        y, factors = loss.weigh(y.detach())
    floating = y.is_floating_point()
    counts = None if weights is None else (weights > 0).sum(1)  # padding comes last
    return [x, y if floating else None, None if floating else y, factors, counts]
