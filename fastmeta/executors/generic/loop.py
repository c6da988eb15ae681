"""The loop over tasks: autograd's double backward, and the graph freed after each task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.generic.features import Body, Model, features_of, through_body
from fastmeta.executors.generic.leaves import (
    DataLeaves,
    SharedLeaves,
    over_tasks,
    set_at,
    stepped,
    with_prox,
)
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Tree, detached, map_tensors, stacked


def run(problem: Problem, body: Body | None = None) -> Outcome:
    """Computes the step task by task; a `body` is run once a task and set.

    **Raises** `NotKept` where the body turns out to be run at every pass.
    """
    shared, data = SharedLeaves(problem), DataLeaves(problem)
    weights, steps = problem.task_weights, problem.inner.steps
    task_runs: list[_Task] = []
    with torch.enable_grad():
        for index, weight in enumerate(weights.unbind(0)):
            sets, own = data.task(index)
            models = shared.models(len(sets), own, body)
            task = _Task(problem, shared, sets, own, models, first=index == 0)
            total = task.unroll()
            if problem.differentiate:
                gradients = _meta_gradients(shared, own, models, total, weight)
                shared.add(gradients[: len(shared.proxies)])
                data.add(gradients[len(shared.proxies) :])
            del total, models
            task_runs.append(task)
    return Outcome(
        step_losses=over_tasks([task.step_losses for task in task_runs], steps + 1, weights),
        support_losses=over_tasks([task.support_losses for task in task_runs], steps, weights),
        query_outputs=stacked([task.query_output for task in task_runs]),
        gradients=shared.gradients() + data.gradients(),
        adapted=stacked([task.adapted for task in task_runs]),
    )


def _meta_gradients(
    shared: SharedLeaves,
    own: list[Tensor],
    models: list[Model],
    total: Tensor,
    weight: Tensor,
) -> list[Tensor | None]:
    """One task's, by the shared leaves and its own."""
    leaves = [*shared.proxies, *own]
    if not total.requires_grad:
        return [None] * len(leaves)
    features = features_of(models)
    retain_graph = bool(shared.captured)
    found = torch.autograd.grad(
        total,
        [*leaves, *features],
        weight.to(total.dtype),
        retain_graph=retain_graph,
        allow_unused=True,
    )
    gradients: list[Tensor | None] = [*found[: len(leaves)]]
    if features:
        cotangents = dict(zip(map(id, features), found[len(leaves) :], strict=True))
        through = through_body(models, cotangents, leaves, shared.adapted, retain_graph)
        gradients = [
            b if a is None else a if b is None else a + b
            for a, b in zip(gradients, through, strict=True)
        ]
    return gradients


class _Task:
    """One task's inner loop, unrolled on autograd's tape."""

    def __init__(
        self,
        problem: Problem,
        shared: SharedLeaves,
        sets: list[tuple[Any, Any, Tensor | None]],
        own: list[Tensor],
        models: list[Model],
        first: bool,
    ) -> None:
        self._problem = problem
        self._shared = shared
        self._sets, self._models = sets, models
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
        state = self._shared.rule.init({name: theta[name] for name in inner.adapted})
        total: Tensor | None = None
        for step in range(inner.steps + 1):
            if problem.evaluates(step):
                weight, counts = inner.step_weights[step], inner.counts(step)
                with torch.set_grad_enabled(problem.differentiate and counts):
                    loss = self._query_loss(phi, last=step == inner.steps)
                if step == inner.steps:
                    self.query_output = detached(self._prediction)
                self.step_losses.append(loss.detach())
                if counts:
                    worth = loss if weight == 1.0 else loss * weight
                    total = worth if total is None else total + worth
            else:
                self.step_losses.append(None)
            if step < inner.steps:
                given = set_at(problem, self._sets[0], step)
                loss = self._loss(phi, self._models[0], given, problem.objective, step == 0)
                self.support_losses.append(loss.detach())
                phi, state = self._descend(loss, phi, state, step)
        self._prediction = None
        self._models = []  # the body's graph must not outlive the task
        if problem.keep_adapted:
            self.adapted = {name: phi[name].detach() for name in inner.adapted}
        return torch.zeros(()) if total is None else total

    def _query_loss(self, phi: dict[str, Tensor], last: bool) -> Tensor:
        return self._loss(
            phi, self._models[-1], self._sets[-1], self._problem.query_objective, last
        )

    def _loss(
        self, phi: dict[str, Tensor], model: Model, given: Any, objective: Any, ends: bool
    ) -> Tensor:
        """The loss over a set at `phi`; `ends` marks the first support and the last query pass."""
        inputs, targets, weights = given
        problem = self._problem
        self._prediction = model(phi, inputs, self._scratch)
        loss = objective(self._prediction, targets, weights)
        # Where the plan knows every layer there is nothing to capture, unless the model's Python
        # state has changed since: one task is looked at all the same.
        walk = problem.may_capture or (self._first and ends)
        if walk and problem.differentiate and loss.requires_grad:
            moved = (phi[name] for name in problem.inner.adapted)
            known = [*self._shared.proxies, *moved, *self._own]
            self._shared.search(model, loss, known)
        return loss

    def _descend(
        self, loss: Tensor, phi: dict[str, Tensor], state: Any, step: int
    ) -> tuple[dict[str, Tensor], Any]:
        problem, shared, names = self._problem, self._shared, self._problem.inner.adapted
        here = {name: phi[name] for name in names}
        found = (
            torch.autograd.grad(
                loss,
                [*here.values()],
                create_graph=problem.second_order,
                allow_unused=True,
                retain_graph=problem.second_order or bool(shared.captured),
            )
            if loss.requires_grad
            else [None] * len(names)
        )
        gradients = dict(zip(names, found, strict=True))
        gradients = with_prox(problem, shared.rule, gradients, state, here, shared.parameters, step)
        rates = problem.inner.rates_at(shared.rates, step)
        there, state = stepped(problem, shared.rule, gradients, state, here, rates, step)
        if not problem.differentiate:
            there = {name: value.detach().requires_grad_() for name, value in there.items()}
            state = map_tensors(Tensor.detach, state)
        return {**phi, **there}, state
