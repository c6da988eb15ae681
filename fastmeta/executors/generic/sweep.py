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
from fastmeta.executors.generic.leaves import DataLeaves, SharedLeaves, over_tasks
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.random_state import generators, same_random_numbers
from fastmeta.tasks import Tree, detached, stacked


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
        for step in range(inner.steps):
            here = self._path[-1]
            self._random.append(generators(self._problem.task_weights.device))
            point = {name: value.detach().requires_grad_() for name, value in here.items()}
            loss = self._loss(point, 0)
            self.support_losses.append(loss.detach())
            gradients = _gradients(loss, list(point.values()), bool(self._shared.captured))
            there: dict[str, Tensor] = {}
            for name, gradient in zip(point, gradients, strict=True):
                gradient = self._pulled(gradient, here[name], start[name])
                if gradient is None:
                    there[name] = here[name]
                else:
                    rate = _detached(inner.rate(self._shared.rates, name, step))
                    there[name] = here[name] - rate * gradient
            self._path.append(there)
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
        anchor: dict[str, Tensor] = {}
        self._add_query(inner.steps)  # (2)
        for step in range(inner.steps - 1, -1, -1):
            self._through_step(step, anchor)  # (3), (4)
            self._add_query(step)
        for name, value in anchor.items():  # (5)
            self._add(self._shared.parameters[name], value)
        self._through_body()

    def release(self) -> None:
        """Drops what only the sweep needed."""
        self._path.clear()
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
        inner, shared = self._problem.inner, self._shared
        start, here = self._path[0], self._path[step]
        vectors: dict[str, Tensor] = {}
        for name in inner.adapted:
            cotangent = self._lambda.get(id(shared.parameters[name]))
            if cotangent is not None:
                rate = _detached(inner.rate(shared.rates, name, step))
                vectors[name] = rate * cotangent
        if not vectors or (inner.first_order and not shared.learned):
            return
        point = {name: value.detach().requires_grad_() for name, value in here.items()}
        with same_random_numbers(self._problem.task_weights.device, self._random[step]):
            if inner.first_order:
                loss = self._loss(point, 0)
                others: list[Tensor] = []
                gradients = _gradients(loss, list(point.values()), bool(shared.captured))
                products: list[Tensor | None] = [None] * len(point)
            else:
                loss = self._loss(point, 0)
                others = self._others()
                gradients, products = _hessian_product(
                    loss,
                    point,
                    others,
                    vectors,
                    retain_graph=bool(shared.captured),
                )
        for name, gradient in zip(point, gradients, strict=True):
            gradient = self._pulled(gradient, here[name], start[name])
            cotangent = self._lambda.get(id(shared.parameters[name]))
            if gradient is not None and cotangent is not None:
                self._add_rate_gradient(name, step, cotangent * gradient)
        for proxy, product in zip(
            [*(shared.parameters[name] for name in point), *others], products, strict=True
        ):
            if product is not None:
                self._add(proxy, -product)
        if inner.prox and not inner.first_order:
            for name, vector in vectors.items():
                self._add(shared.parameters[name], -inner.prox * vector)
                pull = inner.prox * vector
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
        loss = self._loss(point, -1, last=step == self._problem.inner.steps)
        self.step_losses[step] = loss.detach()
        return loss

    def _loss(self, point: Mapping[str, Tensor], of: int, last: bool = False) -> Tensor:
        problem, shared, model = self._problem, self._shared, self._models[of]
        inputs, targets, weights = self._sets[of]
        prediction = model({**shared.parameters, **point}, inputs, self._scratch)
        loss = problem.objective(prediction, targets, weights)
        if last:
            self.query_output = detached(prediction)
        if problem.differentiate and loss.requires_grad:
            shared.search(model, loss, [*shared.proxies, *point.values(), *self._own])
        return loss

    def _others(self) -> list[Tensor]:
        """The leaves with learning rate 0."""
        adapted = set(self._problem.inner.adapted)
        fixed = [p for name, p in self._shared.parameters.items() if name not in adapted]
        captured = self._shared.captured.values()
        return [*fixed, *captured, *self._own, *features_of(self._models)]

    def _pulled(self, gradient: Tensor | None, here: Tensor, start: Tensor) -> Tensor | None:
        prox = self._problem.inner.prox
        if not prox:
            return gradient
        pull = prox * (here - start)
        return pull if gradient is None else gradient + pull

    def _add(self, proxy: Tensor, value: Tensor) -> None:
        total = self._lambda.get(id(proxy))
        self._lambda[id(proxy)] = value if total is None else total + value

    def _add_rate_gradient(self, name: str, step: int, product: Tensor) -> None:
        inner, shared = self._problem.inner, self._shared
        key = name if name in inner.rates else ""
        if key not in shared.learned:
            return
        rate = shared.learned[key]
        whole = torch.zeros_like(rate)
        part = whole[step] if key in inner.per_step else whole
        part.sub_(product.sum_to_size(part.shape) if part.dim() else product.sum())
        self._add(rate, whole)


def _gradients(
    loss: Tensor,
    leaves: Sequence[Tensor],
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(
        loss, leaves, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def _hessian_product(
    loss: Tensor,
    point: dict[str, Tensor],
    others: list[Tensor],
    vectors: dict[str, Tensor],
    retain_graph: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`(g, H v)` by double backward; the products run over the point's leaves, then `others`.

    Reverse over reverse, through this step alone: faster here than forward over reverse, and in
    less memory (docs/design.md, "Hessian-vector products by autograd").
    """
    leaves = [*point.values(), *others]
    found = _gradients(loss, list(point.values()), create_graph=True)
    gradients: list[Tensor | None] = [None if g is None else g.detach() for g in found]
    # A gradient that does not depend on anything (of a linear loss) has no second derivative.
    curved = {
        name: g
        for name, g in zip(point, found, strict=True)
        if g is not None and g.requires_grad and name in vectors
    }
    if not curved:
        return gradients, [None] * len(leaves)
    products = torch.autograd.grad(
        list(curved.values()),
        leaves,
        [vectors[name].to(g.dtype) for name, g in curved.items()],
        allow_unused=True,
        retain_graph=retain_graph,
    )
    return gradients, list(products)


def _detached(rate: Any) -> Any:
    return rate.detach() if isinstance(rate, Tensor) else rate
