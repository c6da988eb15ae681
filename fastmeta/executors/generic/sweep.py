"""The explicit reverse sweep, task by task: memory flat in K but for the K parameter sets.

Forward through the inner loop without a tape, then backward through it with Hessian-vector
products, each step's graph built and freed on its own (docs/design.md, equations (1) to (5)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from fastmeta.inner.optimizer import no_cotangent
from fastmeta.network.random_state import generators, same_random_numbers
from fastmeta.tasks import Tree, detached, map_tensors, stacked


def run(problem: Problem, body: Body | None = None) -> Outcome:
    """Computes the step task by task; a `body` is run once a task and set.

    **Raises** `NotKept` where the body turns out to be run at every pass.
    """
    shared, data = SharedLeaves(problem), DataLeaves(problem)
    weights, steps = problem.task_weights, problem.inner.steps
    runs: list[_Task] = []
    with torch.enable_grad():
        for index, weight in enumerate(weights.unbind(0)):
            sets, own = data.task(index)
            task = _Task(problem, shared, sets, own, shared.models(len(sets), own, body))
            task.forward()
            if problem.differentiate:
                task.backward()
                shared.add(task.shared_gradients(), weight)
                data.add(task.own_gradients(), weight)
            task.release()
            runs.append(task)
    return Outcome(
        step_losses=over_tasks([task.step_losses for task in runs], steps + 1, weights),
        support_losses=over_tasks([task.support_losses for task in runs], steps, weights),
        query_outputs=stacked([task.query_output for task in runs]),
        gradients=shared.gradients() + data.gradients(),
        adapted=stacked([task.adapted for task in runs]),
    )


class _Task:
    """One task: the parameters of every step, and the cotangents that flow back through them.

    A cotangent is keyed by `id` of the leaf's proxy: `SharedLeaves.proxies` and the task's own.
    """

    def __init__(
        self,
        problem: Problem,
        shared: SharedLeaves,
        sets: list[Any],
        own: list[Tensor],
        models: list[Model],
    ) -> None:
        self._problem = problem
        self._shared = shared
        self._sets, self._models = sets, models
        self._own = own
        self._scratch = problem.model.scratch()
        self._path: list[dict[str, Tensor]] = []  # adapted parameters at theta_0 .. theta_K
        self._states: list[Any] = []  # of the update rule, at s_0 .. s_{K-1}
        self._sigma: Any = None  # the cotangent of the state
        self._random: list[Any] = []
        self._lambda: dict[int, Tensor] = {}
        self.step_losses: list[Tensor | None] = [None] * (problem.inner.steps + 1)
        self.support_losses: list[Tensor] = []
        self.query_output: Tree = None
        self.adapted: dict[str, Tensor] = {}

    def forward(self) -> None:
        """The inner loop alone."""
        inner, parameters = self._problem.inner, self._shared.parameters
        start = {name: parameters[name].detach() for name in inner.adapted}
        self._path.append(start)
        rates = {key: _detached(rate) for key, rate in self._shared.rates.items()}
        rule = self._shared.rule
        state = map_tensors(Tensor.detach, rule.init(start))
        for step in range(inner.steps):
            here = self._path[-1]
            self._random.append(generators(self._problem.task_weights.device))
            self._states.append(state)
            point = {name: value.detach().requires_grad_() for name, value in here.items()}
            loss = self._support_loss(point, step)
            self.support_losses.append(loss.detach())
            found = _gradients(loss, list(point.values()), bool(self._shared.captured))
            gradients = with_prox(
                self._problem, rule, dict(zip(point, found, strict=True)), state, here, start, step
            )
            with torch.no_grad():
                there, state = stepped(
                    self._problem, rule, gradients, state, here, inner.rates_at(rates, step), step
                )
            self._path.append(there)
        self._sigma = no_cotangent(state)
        if self._problem.keep_adapted:
            self.adapted = self._path[-1]
        if not self._problem.differentiate:
            for step in range(inner.steps + 1):
                if self._problem.evaluates(step):
                    with torch.no_grad():
                        self._query_loss(step, self._path[step])

    def backward(self) -> None:
        """The reverse sweep."""
        inner = self._problem.inner
        shared, anchor = self._shared, dict[str, Tensor]()
        self._add_query(inner.steps)  # (2)
        for step in range(inner.steps - 1, -1, -1):
            self._through_step(step, anchor)  # (3), (4)
            self._add_query(step)
        for name, value in anchor.items():  # (5)
            self._add(shared.parameters[name], value)
        of_theta, of_options = shared.rule.pullback_init(self._path[0], self._sigma)
        for name, value in of_theta.items():
            self._add(shared.parameters[name], value)
        for name, value in of_options.items():
            self._add(shared.options[name], value)
        self._through_body()

    def release(self) -> None:
        """Drops what only the sweep needed."""
        self._path.clear()
        self._states.clear()
        self._random.clear()
        self._lambda.clear()
        self._models.clear()

    def shared_gradients(self) -> list[Tensor | None]:
        """This task's gradients in the order of `SharedLeaves.proxies`."""
        return [self._lambda.get(id(proxy)) for proxy in self._shared.proxies]

    def own_gradients(self) -> list[Tensor | None]:
        """The gradients of this task's own inputs and targets."""
        return [self._lambda.get(id(proxy)) for proxy in self._own]

    def _through_body(self) -> None:
        shared = self._shared
        leaves = [*shared.proxies, *self._own]
        through = through_body(
            self._models, self._lambda, leaves, shared.adapted, bool(shared.captured)
        )
        for leaf, gradient in zip(leaves, through, strict=True):
            if gradient is not None:
                self._add(leaf, gradient)

    def _through_step(self, step: int, anchor: dict[str, Tensor]) -> None:
        problem, shared, inner = self._problem, self._shared, self._problem.inner
        start, here = self._path[0], self._path[step]
        proxies = {name: shared.parameters[name] for name in inner.adapted}
        learned = [name for name in proxies if inner.key(name) in shared.learned]
        plain = inner.optimizer.is_plain
        if plain:  # what nothing depends on stays without a gradient
            proxies = {n: proxy for n, proxy in proxies.items() if id(proxy) in self._lambda}
        if not proxies or (plain and inner.first_order and not learned):
            return
        cotangents = {
            name: self._lambda.get(id(proxy), torch.zeros_like(here[name]))
            for name, proxy in proxies.items()
        }
        point = {name: value.detach().requires_grad_() for name, value in here.items()}
        with same_random_numbers(problem.task_weights.device, self._random[step]):
            loss = self._support_loss(point, step)
            others = [] if inner.first_order else self._others()
            found = _gradients(
                loss,
                [*point.values()],
                problem.second_order or bool(shared.captured),
                problem.second_order,
            )
        on_tape = dict(zip(point, found, strict=True))
        gradients = {name: g if g is None else g.detach() for name, g in on_tape.items()}
        gradients = with_prox(
            problem, shared.rule, gradients, self._states[step], here, start, step
        )
        reached = {n: torch.zeros_like(here[n]) if g is None else g for n, g in gradients.items()}
        pulled = shared.rule.pullback(
            {name: reached[name] for name in proxies},
            self._states[step],
            {name: here[name] for name in proxies},
            inner.rates_at({key: _detached(rate) for key, rate in shared.rates.items()}, step),
            step,
            (cotangents, self._sigma),
            [name for name in learned if name in proxies],
        )
        self._sigma = pulled.state
        for name, gradient in pulled.rates.items():
            self._add_rate_gradient(name, step, gradient)
        for name, gradient in pulled.options.items():
            self._add(shared.options[name], gradient)
        for name, proxy in proxies.items():
            self._lambda[id(proxy)] = pulled.parameters[name]
        if inner.first_order:
            return
        leaves = [*(shared.parameters[name] for name in point), *others]
        products = _products(
            on_tape, pulled.gradients, [*point.values(), *others], bool(shared.captured)
        )
        for proxy, product in zip(leaves, products, strict=True):
            if product is not None:
                self._add(proxy, product)
        for name, gamma in pulled.anchored.items() if inner.prox else ():
            self._add(proxies[name], inner.prox * gamma)
            pull = -inner.prox * gamma
            anchor[name] = anchor[name] + pull if name in anchor else pull

    def _add_query(self, step: int) -> None:
        inner = self._problem.inner
        weight = inner.step_weights[step]
        if not self._problem.evaluates(step):
            return
        if not inner.counts(step):
            with torch.no_grad():
                self._query_loss(step, self._path[step])
            return
        here = self._path[step]
        point = {name: value.detach().requires_grad_() for name, value in here.items()}
        loss = self._query_loss(step, point)
        others = self._others()
        gradients = _gradients(loss, [*point.values(), *others], bool(self._shared.captured))
        proxies = [*(self._shared.parameters[name] for name in point), *others]
        for proxy, gradient in zip(proxies, gradients, strict=True):
            if gradient is not None:
                self._add(proxy, gradient if weight == 1.0 else weight * gradient)

    def _query_loss(self, step: int, point: Mapping[str, Tensor]) -> Tensor:
        objective = self._problem.query_objective
        loss, prediction = self._loss(point, self._models[-1], self._sets[-1], objective)
        self.step_losses[step] = loss.detach()
        if step == self._problem.inner.steps:
            self.query_output = detached(prediction)
        return loss

    def _support_loss(self, point: Mapping[str, Tensor], step: int) -> Tensor:
        given = set_at(self._problem, self._sets[0], step)
        return self._loss(point, self._models[0], given, self._problem.objective)[0]

    def _loss(
        self, point: Mapping[str, Tensor], model: Model, given: Any, objective: Any
    ) -> tuple[Tensor, Any]:
        """The loss over a set, and the prediction."""
        shared = self._shared
        inputs, targets, weights = given
        prediction = model({**shared.parameters, **point}, inputs, self._scratch)
        loss = objective(prediction, targets, weights)
        if self._problem.differentiate and loss.requires_grad:
            shared.search(model, loss, [*shared.proxies, *point.values(), *self._own])
        return loss, prediction

    def _others(self) -> list[Tensor]:
        """The leaves with learning rate 0."""
        adapted = set(self._problem.inner.adapted)
        fixed = [p for name, p in self._shared.parameters.items() if name not in adapted]
        captured = self._shared.captured.values()
        return [*fixed, *captured, *self._own, *features_of(self._models)]

    def _add(self, proxy: Tensor, value: Tensor) -> None:
        total = self._lambda.get(id(proxy))
        self._lambda[id(proxy)] = value if total is None else total + value

    def _add_rate_gradient(self, name: str, step: int, gradient: Tensor) -> None:
        inner = self._problem.inner
        key = inner.key(name)
        rate = self._shared.learned[key]
        whole = torch.zeros_like(rate)
        (whole[step] if key in inner.per_step else whole).add_(gradient)
        self._add(rate, whole)


def _gradients(
    loss: Tensor,
    leaves: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(
        loss,
        leaves,
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        allow_unused=True,
    )


def _products(
    gradients: Mapping[str, Tensor | None],
    vectors: Mapping[str, Tensor],
    leaves: list[Tensor],
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """The products of the Hessian with `vectors`, by the leaves.

    Reverse over reverse, through this step alone: faster here than forward over reverse, and in
    less memory (docs/design.md, "Hessian-vector products by autograd").
    """
    # A gradient that does not depend on anything (of a linear loss) has no second derivative.
    curved = {
        name: gradient
        for name, gradient in gradients.items()
        if gradient is not None and gradient.requires_grad and name in vectors
    }
    if not curved:
        return [None] * len(leaves)
    return torch.autograd.grad(
        list(curved.values()),
        leaves,
        [vectors[name].to(gradient.dtype) for name, gradient in curved.items()],
        allow_unused=True,
        retain_graph=retain_graph,
    )


def _detached(rate: Any) -> Any:
    return rate.detach() if isinstance(rate, Tensor) else rate
