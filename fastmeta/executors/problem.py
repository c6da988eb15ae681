"""What every executor is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.inner_loop import InnerLoop
from fastmeta.network.stateless import StatelessModel
from fastmeta.tasks import TaskBatch, Tree


@dataclass(frozen=True, eq=False)
class Problem:
    """One meta-step to compute.

    `objective(prediction, targets, weights)` is the mean loss of one task's support examples,
    `query_objective` that of its query examples; `weights` (`[N]` or None) are those of `Examples`.
    `differentiate` asks for the meta-gradient.
    """

    model: StatelessModel
    objective: Callable[[Any, Tree, Tensor | None], Tensor]
    query_objective: Callable[[Any, Tree, Tensor | None], Tensor]
    tasks: TaskBatch
    inner: InnerLoop
    task_weights: Tensor  # [T], cut off from autograd
    differentiate: bool
    low_memory: bool
    """Whether memory is to stay flat in the number of inner steps."""
    may_capture: bool
    """Whether loss or model could reach a tensor that is neither argument nor parameter."""
    draws_random: bool = False
    """Whether a forward pass draws from torch's generator (dropout)."""
    keep_adapted: bool = False
    """Whether the adapted parameters are asked for."""
    has_attention: bool = False
    """Whether a forward pass calls `scaled_dot_product_attention`."""
    captured: tuple[Sequence[Any], Sequence[Any]] = ((), ())
    """What traced losses read beside their arguments now, of the support and the query sets'."""
    unread: frozenset[str] = frozenset()
    """Parameters that no layer reads, where the layers are known: an auxiliary head's."""
    keeps_features: bool = False
    """True where running once what stands in front of the adapting parameters has been verified."""
    must_keep_features: bool = False
    """True where a step whose features can't be kept is to fail: in their verification."""

    @property
    def without_unread(self) -> Problem:
        """The same where nothing adapts that no layer reads."""
        if not self.unread or self.unread.isdisjoint(self.inner.adapted):
            return self
        return replace(self, inner=self.inner.without(self.unread))

    def completed(self, outcome: Outcome) -> Outcome:
        """The outcome of `without_unread`, with what no layer reads: its gradient is 0."""
        names = self.unread.intersection(self.inner.adapted) if self.keep_adapted else ()
        if names:
            inner, named, tasks = self.inner, self.model.parameters(), self.tasks.tasks
            theta = {n: named[n].detach().expand(tasks, *named[n].shape).clone() for n in names}
            rule = inner.rule_with({})
            state = rule.init(theta)
            for step in range(0 if rule.is_plain else inner.steps):  # weights may decay
                zeros = {name: torch.zeros_like(value) for name, value in theta.items()}
                rates = inner.rates_at(inner.fixed_rates(), step)
                theta, state = rule.update(zeros, state, theta, rates, step)
            outcome.adapted.update(theta)
        return outcome

    @property
    def second_order(self) -> bool:
        """Whether Hessian-vector products are asked for."""
        return self.differentiate and not self.inner.first_order

    def shortened(self, tasks: int, steps: int, evaluate_all: bool = False) -> Problem:
        """The first tasks alone, with at most so many inner steps."""
        inner = self.inner
        if inner.steps > steps or evaluate_all:
            steps = min(inner.steps, steps)
            weights = ((1.0 if evaluate_all else 0.0),) * steps + (1.0,)
            inner = replace(inner, steps=steps, step_weights=weights, learned_step_weights=None)
        some = self.tasks.first(tasks).of_steps(steps)
        return replace(self, tasks=some, inner=inner, task_weights=self.task_weights[: some.tasks])

    def evaluates(self, step: int) -> bool:
        """Whether the query loss after this many steps is asked for."""
        return self.tasks.query is not None and self.inner.evaluates(step)


@dataclass(eq=False)
class Outcome:
    """The loss of every task, and the meta-gradient where it was asked for.

    `gradients` pairs each leaf with the gradient of `sum_t task_weights[t] * task_losses[t]`,
    or with None where the loss does not reach it.
    """

    step_losses: Tensor  # [K + 1, T]; zero where not evaluated
    support_losses: Tensor  # [K, T]
    query_outputs: Tree  # leaves [T, Q, ...]; None without a query set
    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    adapted: dict[str, Tensor] = field(default_factory=dict)  # name to [T, ...]


class FormUnavailable(Exception):
    """A problem that a form, on the data at hand, can't compute; the message says why."""


class WrongLabel(Exception):
    """A label that is none of the network's classes."""
