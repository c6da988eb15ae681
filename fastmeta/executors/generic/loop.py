"""The loop over tasks: autograd's double backward, and the graph freed after each task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.generic.leaves import (
    DataLeaves,
    SharedLeaves,
    captured_leaves,
    over_tasks,
)
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Tree, detached, stacked


def run(problem: Problem) -> Outcome:
    """Computes the step task by task."""
    shared, data = SharedLeaves(problem), DataLeaves(problem)
    weights, steps = problem.task_weights, problem.inner.steps
    task_runs: list[_Task] = []
    with torch.enable_grad():
        for index, weight in enumerate(weights.unbind(0)):
            sets, own = data.task(index)
            task = _Task(problem, shared, sets, own, first=index == 0)
            if problem.differentiate:
                total = task.unroll()
                leaves = [*shared.proxies, *own]
                gradients = (
                    torch.autograd.grad(
                        total,
                        leaves,
                        weight.to(total.dtype),
                        retain_graph=bool(shared.captured),
                        allow_unused=True,
                    )
                    if total.requires_grad
                    else [None] * len(leaves)
                )
                shared.add(gradients[: len(shared.proxies)])
                data.add(gradients[len(shared.proxies) :])
                del total
            else:
                task.unroll()
            task_runs.append(task)
    return Outcome(
        step_losses=over_tasks([task.step_losses for task in task_runs], steps + 1, weights),
        support_losses=over_tasks([task.support_losses for task in task_runs], steps, weights),
        query_outputs=stacked([task.query_output for task in task_runs]),
        gradients=shared.gradients() + data.gradients(),
        adapted=stacked([task.adapted for task in task_runs]),
    )


class _Task:
    """One task's inner loop, unrolled on autograd's tape."""

    def __init__(
        self,
        problem: Problem,
        shared: SharedLeaves,
        sets: list[tuple[Any, Any, Tensor | None]],
        own: list[Tensor],
        first: bool,
    ) -> None:
        self._problem = problem
        self._shared = shared
        self._support, self._query = sets[0], sets[-1]
        self._own = own
        self._first = first
        self._scratch = problem.model.scratch()
        self.step_losses: list[Tensor | None] = []
        self.support_losses: list[Tensor] = []
        self.query_output: Tree = None
        self._prediction: Tree = None
        self.adapted: dict[str, Tensor] = {}

    def unroll(self) -> Tensor:
        """The weighted sum of the query losses, on the tape where a gradient is asked for."""
        problem, inner = self._problem, self._problem.inner
        theta = self._shared.parameters
        phi = dict(theta)
        total: Tensor | None = None
        for step in range(inner.steps + 1):
            if problem.evaluates(step):
                weight, counts = inner.step_weights[step], inner.counts(step)
                with torch.set_grad_enabled(problem.differentiate and counts):
                    loss = self._loss(phi, self._query, ends=step == inner.steps)
                if step == inner.steps:
                    self.query_output = detached(self._prediction)
                self.step_losses.append(loss.detach())
                if counts:
                    worth = loss if weight == 1.0 else loss * weight
                    total = worth if total is None else total + worth
            else:
                self.step_losses.append(None)
            if step < inner.steps:
                loss = self._loss(phi, self._support, ends=step == 0)
                self.support_losses.append(loss.detach())
                phi = self._descend(loss, phi, step)
        self._prediction = None
        if problem.keep_adapted:
            self.adapted = {name: phi[name].detach() for name in inner.adapted}
        return torch.zeros(()) if total is None else total

    def _loss(self, phi: dict[str, Tensor], examples: Any, ends: bool) -> Tensor:
        """The loss at `phi`; `ends` marks the first support and the last query pass."""
        inputs, targets, weights = examples
        problem = self._problem
        self._prediction = problem.model(phi, inputs, self._scratch)
        loss = problem.objective(self._prediction, targets, weights)
        # Where the plan knows every layer there is nothing to capture, unless the model's Python
        # state has changed since: one task is looked at all the same.
        walk = problem.may_capture or (self._first and ends)
        if walk and problem.differentiate and loss.requires_grad:
            known = [*self._shared.proxies, *phi.values(), *self._own]
            self._shared.capture(captured_leaves(loss, known))
        return loss

    def _descend(self, loss: Tensor, phi: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        problem, inner = self._problem, self._problem.inner
        second_order = problem.differentiate and not inner.first_order
        names = inner.adapted
        gradients = (
            torch.autograd.grad(
                loss,
                [phi[name] for name in names],
                create_graph=second_order,
                allow_unused=True,
                retain_graph=second_order or bool(self._shared.captured),
            )
            if loss.requires_grad
            else [None] * len(names)
        )
        moved = dict(phi)
        for name, gradient in zip(names, gradients, strict=True):
            here = phi[name]
            if inner.prox:
                pull = here - self._shared.parameters[name]
                pull = pull if second_order else pull.detach()
                gradient = pull * inner.prox if gradient is None else gradient + pull * inner.prox
            if gradient is None:
                continue
            rate = inner.rate(self._shared.rates, name, step)
            if isinstance(rate, Tensor):
                there = here - rate * gradient
            else:
                there = here.sub(gradient, alpha=rate)
            moved[name] = there if problem.differentiate else there.detach().requires_grad_()
        return moved
