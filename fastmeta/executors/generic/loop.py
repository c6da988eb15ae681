"""The loop over tasks: autograd's double backward, and the graph freed after each task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.generic.features import Body, Model, features_of, through_body
from fastmeta.executors.generic.leaves import DataLeaves, SharedLeaves, over_tasks
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Tree, detached, stacked


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
        total: Tensor | None = None
        for step in range(inner.steps + 1):
            if problem.evaluates(step):
                weight, counts = inner.step_weights[step], inner.counts(step)
                with torch.set_grad_enabled(problem.differentiate and counts):
                    loss = self._loss(phi, -1, ends=step == inner.steps)
                if step == inner.steps:
                    self.query_output = detached(self._prediction)
                self.step_losses.append(loss.detach())
                if counts:
                    worth = loss if weight == 1.0 else loss * weight
                    total = worth if total is None else total + worth
            else:
                self.step_losses.append(None)
            if step < inner.steps:
                loss = self._loss(phi, 0, ends=step == 0)
                self.support_losses.append(loss.detach())
                phi = self._descend(loss, phi, step)
        self._prediction = None
        self._models = []  # the body's graph must not outlive the task
        if problem.keep_adapted:
            self.adapted = {name: phi[name].detach() for name in inner.adapted}
        return torch.zeros(()) if total is None else total

    def _loss(self, phi: dict[str, Tensor], of: int, ends: bool) -> Tensor:
        """The loss over a set at `phi`; `ends` marks the first support and the last query pass."""
        inputs, targets, weights = self._sets[of]
        model = self._models[of]
        problem = self._problem
        self._prediction = model(phi, inputs, self._scratch)
        loss = problem.objective(self._prediction, targets, weights)
        # Where the plan knows every layer there is nothing to capture, unless the model's Python
        # state has changed since: one task is looked at all the same.
        walk = problem.may_capture or (self._first and ends)
        if walk and problem.differentiate and loss.requires_grad:
            moved = (phi[name] for name in problem.inner.adapted)
            known = [*self._shared.proxies, *moved, *self._own]
            self._shared.search(model, loss, known)
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
