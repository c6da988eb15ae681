"""One call of a compiled step: the tensors that it reads, and those that it writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.problem import Outcome, Problem


class WrongLabel(Exception):
    """A label is none of the network's classes."""


class Compiled(Protocol):
    """What the kernels of compiled steps have in common."""

    @property
    def step(self) -> Any:
        """The compiled step."""
        ...

    @property
    def names(self) -> tuple[str | None, ...]:
        """Of its tensors: weight, bias, scale and shift of each layer."""
        ...

    @property
    def norms(self) -> tuple[packing.Norm | None, ...]:
        """The batch norm of each layer."""
        ...

    @property
    def outputs(self) -> int:
        """How many numbers it predicts for an example."""
        ...

    @property
    def evaluates(self) -> tuple[bool, ...]:
        """Whether the query loss after each number of steps is asked for."""
        ...


class Call:
    """Parameters and statistics as they are read, and fresh tensors for the results."""

    def __init__(self, problem: Problem, kernel: Compiled) -> None:
        inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
        names, named = kernel.names, problem.model.all_parameters()
        count, query = tasks.tasks, tasks.query
        self.parameters = [None if name is None else readable(named[name]) for name in names]
        self.statistics = packing.statistics(problem, kernel.norms)
        self.step_losses = weights.new_zeros(inner.steps + 1, count)
        self.support_losses = weights.new_empty(inner.steps, count)
        # Nothing is predicted for padding.
        make = weights.new_zeros if query and query.weights is not None else weights.new_empty
        self.outputs = make(count, query.count if query else 0, kernel.outputs)
        self.adapted = {
            name: weights.new_empty(count, *named[name].shape)
            for name in (inner.adapted if problem.keep_adapted else ())
        }

    def adapted_of(self, names: Sequence[str | None]) -> list[Tensor | None]:
        """Where each tensor's adapted values go; nothing where none are asked for."""
        return [self.adapted.get(name or "") for name in names] if self.adapted else []

    def outcome(self, problem: Problem, kernel: Compiled, gradient: Tensor) -> Outcome:
        """What the step has left, `gradient` being the packed meta-gradient."""
        outcome = Outcome(
            self.step_losses,
            self.support_losses,
            self.outputs if problem.tasks.query else None,
            adapted=self.adapted,
        )
        if problem.differentiate:
            outcome.gradients = packing.gradients(problem, kernel.names, gradient)
        return outcome


def run(
    problem: Problem,
    kernel: Compiled,
    rates: Tensor,
    support: Sequence[Tensor | None],
    query: Sequence[Tensor | None],
) -> Outcome:
    """Computes the step on the CPU; `support` and `query` are as the compiled step takes them.

    **Raises** `WrongLabel`, before anything is computed.
    """
    call, step = Call(problem, kernel), kernel.step
    task_weights = readable(problem.task_weights)
    gradient = task_weights.new_empty(step.gradients if problem.differentiate else 0)
    computed = step.run(
        problem.tasks.tasks,
        addresses(call.parameters),
        addresses(call.adapted_of(kernel.names)),
        addresses(call.statistics),
        rates.data_ptr(),
        problem.inner.step_weights,
        kernel.evaluates,
        task_weights.data_ptr(),
        addresses(support),
        addresses(query),
        call.support_losses.data_ptr(),
        call.step_losses.data_ptr(),
        call.outputs.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    if not computed:
        raise WrongLabel
    return call.outcome(problem, kernel, gradient)


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where the numbers of each begin; 0 where there is none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def readable(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in order in memory; itself where they are."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()
