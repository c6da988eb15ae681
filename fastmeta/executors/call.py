"""One call of a compiled step: the tensors that it reads, and those that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.addresses import Addresses
from fastmeta.executors.problem import Outcome, Problem, WrongLabel

SUPPORT = ("support_x", "support_y", "support_y", "support weights", "support weights")
QUERY = ("query_x", "query_y", "query_y", "query weights", "query weights")
"""Names of a set's tensors, in the order in which the compiled steps take them."""


class Compiled(Protocol):
    """The attributes that the kernels of compiled steps have in common."""

    @property
    def step(self) -> Any:
        """The compiled step."""
        ...

    @property
    def names(self) -> tuple[str | None, ...]:
        """The names of its tensors: weight, bias, scale and shift of each layer."""
        ...

    @property
    def norms(self) -> tuple[packing.Norm | None, ...]:
        """The batch norm of each layer."""
        ...

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of an example's prediction."""
        ...

    @property
    def evaluates(self) -> tuple[bool, ...]:
        """By number of steps, True where the query loss after them is asked for."""
        ...


Given = list[tuple[Tensor, int]]
"""Tensors, each with the distance between two tasks' data."""


@dataclass(frozen=True, eq=False)
class OwnInputs:
    """Inputs of losses of the user's own."""

    support: Given
    query: Given
    learned: Sequence[Tensor]
    """The captured tensors whose gradients come last in the packed one."""


class Call:
    """Parameters and statistics as they are read, and fresh tensors for the results."""

    def __init__(self, problem: Problem, kernel: Compiled) -> None:
        inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
        names, named = kernel.names, problem.model.all_parameters()
        count, query = tasks.tasks, tasks.query
        self.parameters = [None if name is None else named[name] for name in names]
        self.statistics = packing.statistics(problem, kernel.norms)
        self.step_losses = weights.new_zeros(inner.steps + 1, count)
        self.support_losses = weights.new_empty(inner.steps, count)
        # Nothing is predicted for padding.
        make = weights.new_zeros if query and query.weights is not None else weights.new_empty
        self.outputs = make(count, query.count if query else 0, *kernel.output_shape)
        self.adapted = {
            name: weights.new_empty(count, *named[name].shape)
            for name in (inner.adapted if problem.keep_adapted else ())
        }

    def read(self, at: Addresses, kernel: Compiled) -> tuple[list[int], list[int], list[int]]:
        """The addresses of parameters, of where adapted ones go if asked for, of statistics."""
        adapted = [self.adapted.get(name or "") for name in kernel.names] if self.adapted else []
        norms = kernel.norms if any(kernel.norms) else ()
        statistics = [name for norm in norms for name in _statistics(norm)]
        return (
            at.each(self.parameters, kernel.names),
            at.each(adapted, kernel.names),
            at.each(self.statistics, statistics),
        )

    def written(self) -> tuple[int, int, int]:
        """The addresses of support losses, step losses and outputs, which were made here."""
        return self.support_losses.data_ptr(), self.step_losses.data_ptr(), self.outputs.data_ptr()

    def outcome(self, problem: Problem, kernel: Compiled, gradient: Tensor) -> Outcome:
        """The results of the step, `gradient` being the packed meta-gradient."""
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
    rule_options: Sequence[float] = (),
    own: OwnInputs | None = None,
    masks: tuple[Given, Given] = ([], []),
    flows: Sequence[Tensor] = (),
) -> Outcome:
    """Computes the step on the CPU; `support` and `query` are as the compiled step takes them.

    `rule_options` are the numbers of an update rule that has any; `masks` those of dropout. The
    derivatives by the inputs of each set are written to `flows`.

    **Raises** `WrongLabel`, before anything is computed.
    """
    call, step, at = Call(problem, kernel), kernel.step, Addresses()
    gradient = problem.task_weights.new_empty(step.gradients if problem.differentiate else 0)
    rate, weights = at.each((rates, problem.task_weights), ("inner_lr", "task_weights"))
    computed = step.run(
        problem.tasks.tasks,
        *call.read(at, kernel),
        rate,
        problem.inner.step_weights,
        kernel.evaluates,
        weights,
        at.each(support, SUPPORT),
        at.each(query, QUERY),
        *call.written(),
        gradient.data_ptr(),
        torch.get_num_threads(),
        list(rule_options),
        *_besides(own, masks, flows),
    )
    if not computed:
        raise WrongLabel
    outcome = call.outcome(problem, kernel, gradient)
    if own is not None and own.learned and problem.differentiate:
        sizes = [tensor.numel() for tensor in own.learned]
        parts = gradient[len(gradient) - sum(sizes) :].split(sizes)
        for tensor, part in zip(own.learned, parts, strict=True):
            outcome.gradients.append((tensor, part.view(tensor.shape).to(tensor)))
    return outcome


def _besides(
    own: OwnInputs | None, masks: tuple[Given, Given], flows: Sequence[Tensor]
) -> list[Any]:
    """The further arguments of steps whose networks or losses need any."""
    if own is None and not masks[0] and not flows:
        return []
    losses = ([], []) if own is None else (own.support, own.query)
    written = [flow.data_ptr() for flow in flows] + [0, 0]
    return [*(_addresses(given) for given in (*losses, *masks)), tuple(written[:2])]


def _addresses(given: Given) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), stride) for tensor, stride in given]


def _statistics(norm: packing.Norm | None) -> tuple[str | None, str | None]:
    """The names of a norm's running statistics."""
    return (norm.mean, norm.variance) if norm else (None, None)
