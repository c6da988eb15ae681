"""Equations (1) to (5) of docs/design.md over layers, for some tasks at once.

Cotangents carry the tasks' weights from the start, so that whatever is shared by the tasks can be
summed over them where it is made: the parameters that do not adapt, and all of them at step 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.layers import many
from fastmeta.executors.layers.lowering import INPUT, Lowered, Parts
from fastmeta.executors.layers.many import Parameters
from fastmeta.executors.layers.passes import GradientRequest, Pass, Passes, PassGradients, Values
from fastmeta.executors.layers.rates import RateGradients
from fastmeta.executors.problem import Problem
from fastmeta.inner.optimizer import Pullback, no_cotangent
from fastmeta.network.layers import Batch
from fastmeta.network.losses.open import OpenLoss
from fastmeta.network.losses.rules import PreparedLoss, prepare
from fastmeta.network.losses.standard import Loss
from fastmeta.tasks import Examples, TaskBatch, map_tensors


@dataclass(eq=False)
class Step:
    """An inner step, as the reverse sweep needs it."""

    theta: Parameters
    """The adapted parameters before it, `[S, ...]`."""
    gradient: Parameters
    """`g_k`, `[T, ...]`, where the way back needs it."""
    state: Any = ()
    """That of the update rule before it."""
    run: Pass | None = None
    """Its pass over the support set; None where it is run again."""
    prediction: Tensor | None = None


@dataclass(eq=False)
class Side:
    """A support or query set of these tasks."""

    examples: Examples
    of: Loss | None
    batch: Batch
    border: Values = field(default_factory=dict)
    """The outputs of the body that the head reads, or the input."""
    body: Pass | None = None
    cotangents: Values = field(default_factory=dict)
    """Cotangents of the border, summed over steps."""
    loss: PreparedLoss | None = None


@dataclass(eq=False)
class Result:
    """The results of a sweep, without its passes."""

    step_losses: list[Tensor]
    support_losses: list[Tensor] = field(default_factory=list)
    query_output: Tensor | None = None
    adapted: Parameters = field(default_factory=dict)
    """Where it is asked for."""
    gradients: Parameters = field(default_factory=dict)
    """The trainable parameters' gradients, summed over tasks, `[1, ...]`."""
    options: Parameters = field(default_factory=dict)
    """The gradients of the update rule's learned options."""
    open_losses: list[OpenLoss] = field(default_factory=list)
    """Those that may have reached other leaves."""


class Sweep:
    """The meta-step of some tasks."""

    def __init__(
        self,
        problem: Problem,
        lowered: Lowered,
        parts: Parts,
        passes: Passes,
        keeps_steps: bool,
        tensors: Parameters,
        weights: Tensor,
        rates: RateGradients,
    ) -> None:
        """`tensors` are parameters and buffers, `[1, ...]`; `weights [T]` those of the tasks."""
        self._problem, self._inner = problem, problem.inner
        self._lowered, self._parts, self._keeps_steps = lowered, parts, keeps_steps
        self._passes, self._tensors, self._weights = passes, tensors, weights
        self._second_order = problem.differentiate and not problem.inner.first_order
        self._rates = problem.inner.fixed_rates()
        self._rate_gradients = rates
        self._steps: list[Step] = []
        self._lambda: Parameters = {}  # [T, ...], of what adapts
        self._sigma: Any = None  # the cotangent of the rule's state
        self._rule = problem.inner.optimizer
        self._learned = rates.learned()
        # The way back through an update of plain descent needs no gradient.
        self._is_linear = self._rule.is_plain and not self._learned
        trainable = problem.model.parameters()
        self._others = [
            n for n in lowered.names() if n in trainable and n not in problem.inner.adapted
        ]
        self._result = Result([torch.zeros_like(weights) for _ in problem.inner.step_weights])

    def run(self, tasks: TaskBatch) -> Result:
        """Compute the step."""
        sets = 0 if not self._inner.steps else 1 if tasks.per_step is None else self._inner.steps
        lowered = self._lowered
        self._supports = [self._enter(k, tasks.support_at(k), lowered.loss) for k in range(sets)]
        self._query = (
            None if tasks.query is None else self._enter(None, tasks.query, lowered.query_loss)
        )
        self._forward()
        if self._problem.differentiate:
            self._backward()
        return self._result

    def _enter(self, step: int | None, examples: Examples, loss: Loss | None) -> Side:
        """A set at the head's border: the body is run once."""
        batch = Batch(examples.tasks, examples.count, examples.weights)
        side = Side(examples, loss, batch, {INPUT: examples.inputs.detach()})
        if self._parts.body:
            body = self._passes.body(step, self._tensors, batch)
            side.border = body.forward(side.border, self._parts.border)
            side.body = body if self._problem.differentiate else None
        return side

    def _forward(self) -> None:
        """The inner loop."""
        inner = self._inner
        theta = {name: self._tensors[name] for name in inner.adapted}  # [1, ...]
        state = self._rule.init(self._of_tasks(theta))
        for k in range(inner.steps):
            self._evaluate(k, theta)
            step = self._inner_step(k, theta, state, again=False)
            rates = self._rates_at(k)
            if self._rule.is_plain:
                theta = many.descended(theta, step.gradient, rates)  # (1)
            else:
                here = self._of_tasks(theta)
                theta, state = self._rule.update(step.gradient, state, here, rates, k)  # (1)
            self._remember(step)
        self._evaluate(inner.steps, theta)
        self._steps.append(Step(theta, {}))
        self._sigma = no_cotangent(state)
        if self._problem.keep_adapted:
            self._result.adapted = theta

    def _of_tasks(self, theta: Parameters) -> Parameters:
        """Give an update rule the parameters of every task, `[T, ...]`, where all share one."""
        tasks = len(self._weights)
        return {name: p.expand(tasks, *p.shape[1:]) for name, p in theta.items()}

    def _evaluate(self, k: int, theta: Parameters) -> None:
        """The query loss after k steps, where the reverse sweep does not come to it."""
        later = self._problem.differentiate and self._inner.counts(k)
        if self._problem.evaluates(k) and not later:
            self._query_loss(k, theta)

    def _remember(self, step: Step) -> None:
        """Drop of a step what the reverse sweep does not need, or makes again."""
        needed = self._problem.differentiate and not self._is_linear
        step.gradient = step.gradient if needed else {}
        if not (self._second_order and self._keeps_steps):
            if step.prediction is not None:
                self._loss(self._side(len(self._steps)), step.prediction).release(step.prediction)
            step.run = step.prediction = None
        self._steps.append(step)

    def _inner_step(self, k: int, theta: Parameters, state: Any, again: bool) -> Step:
        """The support loss at theta and its gradient, the proximal term's included."""
        side = self._side(k)
        run, prediction = self._head(k, side, theta)
        loss = self._loss(side, prediction)
        if not again:
            self._result.support_losses.append(loss.value(prediction))
        request = GradientRequest(
            self._parts.moving, dict.fromkeys(self._inner.adapted, side.batch.tasks)
        )
        found = run.backward({self._lowered.output: loss.gradient(prediction)}, request)
        gradient = found.parameters
        for name in self._inner.adapted:
            if name not in gradient:
                shape = (side.batch.tasks, *theta[name].shape[1:])
                gradient[name] = theta[name].new_zeros(()).expand(shape)
            if self._inner.prox and k:
                pull = self._inner.prox * (theta[name] - self._tensors[name])
                gradient[name] = gradient[name] + pull
        return Step(theta, gradient, state, run, prediction)

    def _side(self, k: int) -> Side:
        """The support set of an inner step."""
        return self._supports[k if len(self._supports) > 1 else 0]

    def _backward(self) -> None:
        """The reverse sweep."""
        inner = self._inner
        anchor: Parameters = {}
        self._add_query(inner.steps)  # (2)
        for k in range(inner.steps - 1, -1, -1):
            self._through_step(k, anchor)
            self._add_query(k)
        many.add(self._result.gradients, many.over_tasks(self._lambda), 1.0)
        many.add(self._result.gradients, anchor, 1.0)  # (5)
        if inner.steps:
            theta = {name: self._tensors[name] for name in inner.adapted}
            of_theta, of_options = self._rule.pullback_init(self._of_tasks(theta), self._sigma)
            many.add(self._result.gradients, many.over_tasks(of_theta), 1.0)
            many.add(self._result.options, of_options, 1.0)
        for side in (*self._supports, self._query):
            self._leave(side)

    def _through_step(self, k: int, anchor: Parameters) -> None:
        inner, step = self._inner, self._steps[k]
        if not self._lambda or (self._is_linear and inner.first_order):
            return
        for name in inner.adapted:
            if name not in self._lambda:
                self._lambda[name] = self._zeros(name)
        rates = self._rates_at(k)
        if self._is_linear:
            gammas = many.scaled(self._lambda, {name: -rate for name, rate in rates.items()})
            anchored = gammas if k else {}
            pulled = Pullback(self._lambda, self._sigma, gammas, anchored, {}, {})
        else:
            pulled = self._rule.pullback(
                step.gradient, step.state, self._of_tasks(step.theta), rates, k,
                (self._lambda, self._sigma), self._learned,
            )  # fmt: skip
        self._lambda, self._sigma = dict(pulled.parameters), pulled.state
        for name, gradient in pulled.rates.items():
            self._rate_gradients.add(name, k, gradient)  # (3)
        many.add(self._result.options, pulled.options, 1.0)
        if not self._second_order:
            return
        side = self._side(k)
        if step.run is None:
            step = self._inner_step(k, step.theta, step.state, again=True)
        run, prediction = step.run, step.prediction
        assert run is not None
        assert prediction is not None
        along = run.tangent(pulled.gradients, self._lowered.output)
        loss = self._loss(side, prediction)
        tangent = loss.tangent(prediction, along)
        loss.release(prediction)
        product = run.tangent_backward({self._lowered.output: tangent}, self._request(k))
        self._steps[k] = Step(step.theta, {})  # Its pass is not needed any more.
        self._collect(side, product)  # (4)
        for name, gamma in pulled.anchored.items() if inner.prox else ():
            self._lambda[name] = self._lambda[name] + inner.prox * gamma
            pull = -inner.prox * gamma.sum(0, keepdim=True)
            anchor[name] = anchor[name] + pull if name in anchor else pull

    def _zeros(self, name: str) -> Tensor:
        one = self._tensors[name]
        return one.new_zeros(()).expand(len(self._weights), *one.shape[1:])

    def _add_query(self, k: int) -> None:
        """Adds `w_k` times the query loss's gradient at theta_k."""
        weight = self._inner.step_weights[k]
        if self._query is None or not self._inner.counts(k):
            return
        run, prediction, loss = self._query_loss(k, self._steps[k].theta)
        shape = (-1, *(1,) * (prediction.dim() - 1))
        gradient = loss.gradient(prediction) * (weight * self._weights).view(shape)
        loss.capture(prediction, weight * self._weights)
        loss.release(prediction)
        found = run.backward({self._lowered.output: gradient}, self._request(k))
        self._collect(self._query, found)

    def _query_loss(self, k: int, theta: Parameters) -> tuple[Pass, Tensor, PreparedLoss]:
        assert self._query is not None
        run, prediction = self._head(None, self._query, theta)
        loss = self._loss(self._query, prediction)
        self._result.step_losses[k] = loss.value(prediction)
        if k == self._inner.steps:
            self._result.query_output = prediction
        return run, prediction, loss

    def _head(self, step: int | None, side: Side, theta: Parameters) -> tuple[Pass, Tensor]:
        run = self._passes.head(step, {**self._tensors, **theta}, side.batch)
        output = self._lowered.output
        return run, run.forward(side.border, [output])[output]

    def _loss(self, side: Side, prediction: Tensor) -> PreparedLoss:
        if side.loss is None:
            problem, loss = self._problem, side.of
            targets = map_tensors(Tensor.detach, side.examples.targets)
            if loss is not None:
                kind, options = loss.kind, loss.options
                side.loss = prepare(kind, options, targets, side.batch, prediction)
            else:
                query = side is self._query
                objective = problem.query_objective if query else problem.objective
                opened = OpenLoss(objective, targets, side.batch.tasks)
                self._result.open_losses.append(opened)
                side.loss = opened
        return side.loss

    def _request(self, k: int) -> GradientRequest:
        """All gradients, at step k: summed over the tasks where they share the parameter."""
        each = len(self._weights) if k else 1
        counts = {**dict.fromkeys(self._others, 1), **dict.fromkeys(self._inner.adapted, each)}
        return GradientRequest(self._parts.learning, counts)

    def _collect(self, side: Side, found: PassGradients) -> None:
        """Add what a pass found to the cotangents and, of what is summed, to the gradients."""
        own = {
            name: part
            for name, part in found.parameters.items()
            if name not in self._others and len(part) == len(self._weights)
        }
        many.add(self._lambda, own, 1.0)
        shared = {name: part for name, part in found.parameters.items() if name not in own}
        many.add(self._result.gradients, shared, 1.0)
        for value, part in found.values.items():
            there = side.cotangents.get(value)
            side.cotangents[value] = part if there is None else there.add(part)

    def _rates_at(self, k: int) -> dict[str, float | Tensor]:
        """The learning rate of each adapted parameter at step k."""
        return self._inner.rates_at(self._rates, k)

    def _leave(self, side: Side | None) -> None:
        """Back through the body, once."""
        if side is None or side.body is None or not side.cotangents:
            return
        counts: dict[str, Any] = dict.fromkeys(self._others, 1)
        found = side.body.backward(side.cotangents, GradientRequest(self._parts.learning, counts))
        many.add(self._result.gradients, found.parameters, 1.0)
