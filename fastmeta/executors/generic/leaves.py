"""The tensors that a task-by-task form differentiates with respect to, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.generic.features import Body, Kept, Model
from fastmeta.executors.problem import Problem
from fastmeta.inner import InnerOptimizer
from fastmeta.inner.one_task import one_task
from fastmeta.network.tape import captured_leaves
from fastmeta.tasks import Tree, map_tensors, unstack


class SharedLeaves:
    """Parameters, learning rates and captured tensors: one gradient, summed over the tasks."""

    def __init__(self, problem: Problem) -> None:
        parameters = problem.model.parameters()
        adapted = frozenset(problem.inner.adapted)
        learned = problem.inner.learned_rates() if problem.differentiate else {}
        self.parameters = {
            # An adapted parameter needs its own gradient even where the meta-gradient does not.
            name: p.detach().requires_grad_(problem.differentiate or name in adapted)
            for name, p in parameters.items()
        }
        self._model = problem.model
        self._staying = [p for name, p in self.parameters.items() if name not in adapted]
        self.adapted = [self.parameters[name] for name in adapted]
        self.learned = {key: rate.detach().requires_grad_() for key, rate in learned.items()}
        self.rates = {**problem.inner.fixed_rates(), **self.learned}
        options = problem.inner.learned_options() if problem.differentiate else {}
        self.options = {name: each.detach().requires_grad_() for name, each in options.items()}
        """The update rule's own tensors."""
        self.rule = one_task(problem.inner.rule_with(self.options))
        self.originals: list[Tensor] = [*parameters.values(), *learned.values(), *options.values()]
        self.proxies: list[Tensor] = [
            *self.parameters.values(),
            *self.learned.values(),
            *self.options.values(),
        ]
        self.captured: dict[int, Tensor] = {}
        self._sums: list[Tensor | None] = [None] * len(self.proxies)
        self._own_sums: set[int] = set()

    def models(self, sets: int, own: list[Tensor], body: Body | None) -> list[Model]:
        """The models that one task's passes over each of its sets call."""
        if body is None:
            return [self._model] * sets
        return [Kept(body, [*self._staying, *own], cut=True) for _ in range(sets)]

    def search(self, model: Model, loss: Tensor, known: Iterable[Tensor]) -> None:
        """Adds the leaves that a loss, and the body in front of it, reach beside the known."""
        if isinstance(model, Kept):
            self.capture(captured_leaves([loss, *model.tape()], [*known, *model.features]))
        else:
            self.capture(captured_leaves([loss], known))

    def capture(self, tensors: Iterable[Tensor]) -> None:
        """Adds leaves that the loss was found to reach; autograd differentiates them in place."""
        for tensor in tensors:
            if id(tensor) not in self.captured:
                self.captured[id(tensor)] = tensor
                self.originals.append(tensor)
                self.proxies.append(tensor)
                self._sums.append(None)

    def add(self, gradients: Sequence[Tensor | None], weight: Tensor | None = None) -> None:
        """Adds one task's gradients, in the order of `proxies`."""
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            gradient = gradient if weight is None else gradient * weight.to(gradient.dtype)
            total = self._sums[i]
            if total is None:
                self._sums[i] = gradient
            elif i in self._own_sums:
                total.add_(gradient)
            else:  # autograd may have handed out the first one twice
                self._sums[i] = total + gradient
                self._own_sums.add(i)

    def gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """Every leaf with its summed gradient."""
        return list(zip(self.originals, self._sums, strict=True))


class DataLeaves:
    """Inputs and targets that require grad: a gradient for each task's own part."""

    def __init__(self, problem: Problem) -> None:
        self._tasks = problem.tasks.tasks
        self._sets: list[tuple[list[Tree], list[Tree]]] = []
        self._moving: list[Tensor] = []
        for examples in problem.tasks.given():
            self._sets.append(
                (
                    unstack(map_tensors(Tensor.detach, examples.inputs), self._tasks),
                    unstack(map_tensors(Tensor.detach, examples.targets), self._tasks),
                )
            )
            if problem.differentiate:
                self._moving += [leaf for leaf in examples.leaves() if leaf.requires_grad]
        self._differentiate = problem.differentiate
        self._parts: list[list[Tensor | None]] = [[] for _ in self._moving]
        self._weights = [
            None if examples.weights is None else examples.weights.unbind(0)
            for examples in problem.tasks.sets()
        ]
        self._flags = [
            [leaf.requires_grad for leaf in examples.leaves()] for examples in problem.tasks.given()
        ]

    def task(self, index: int) -> tuple[list[tuple[Any, Any, Tensor | None]], list[Tensor]]:
        """`(inputs, targets, weights)` of a task's support and query sets, and its leaves."""
        leaves: list[Tensor] = []
        sets: list[tuple[Any, Any, Tensor | None]] = []
        for (inputs, targets), weights, flags in zip(
            self._sets, self._weights, self._flags, strict=True
        ):
            x, y = inputs[index], targets[index]
            if self._differentiate and any(flags):
                x, y = _require_grad((x, y), flags, leaves)
            sets.append((x, y, None if weights is None else weights[index]))
        return sets, leaves

    def add(self, gradients: Sequence[Tensor | None], weight: Tensor | None = None) -> None:
        """Keeps one task's gradients, in the order of its leaves."""
        for part, gradient in zip(self._parts, gradients, strict=True):
            if gradient is not None and weight is not None:
                gradient = gradient * weight.to(gradient.dtype)
            part.append(gradient)

    def gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """Every leaf `[T, ...]` with its gradient."""
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for leaf, parts in zip(self._moving, self._parts, strict=True):
            if all(part is None for part in parts):
                pairs.append((leaf, None))
                continue
            zero = torch.zeros_like(leaf[0])
            pairs.append((leaf, torch.stack([zero if p is None else p for p in parts])))
        return pairs


def filled(
    step_losses: Sequence[Tensor | None], support_losses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`[K + 1]` and `[K]` of one task, with zero where a query loss was not asked for."""
    known = [loss for loss in (*step_losses, *support_losses) if loss is not None]
    zero = torch.zeros_like(known[0]) if known else torch.zeros(())
    steps = torch.stack([zero if loss is None else loss for loss in step_losses])
    return steps, torch.stack(list(support_losses)) if support_losses else zero.new_empty(0)


def over_tasks(losses: Sequence[Sequence[Tensor | None]], steps: int, like: Tensor) -> Tensor:
    """`[steps, T]` of the losses of each task, with zero where one was not asked for."""
    known = next((loss for own in losses for loss in own if loss is not None), None)
    if known is None:
        return like.new_zeros(steps, len(losses))
    zero = torch.zeros_like(known)
    flat = [zero if own[step] is None else own[step] for step in range(steps) for own in losses]
    return torch.stack(flat).view(steps, -1)  # pyright: ignore[reportArgumentType]


def _require_grad(
    tree: tuple[Tree, Tree], flags: list[bool], leaves: list[Tensor]
) -> tuple[Tree, Tree]:
    position = iter(flags)

    def mark(leaf: Tensor) -> Tensor:
        if next(position):
            leaf = leaf.detach().requires_grad_()
            leaves.append(leaf)
        return leaf

    x, y = tree
    return map_tensors(mark, x), map_tensors(mark, y)


def set_at(problem: Problem, given: tuple[Any, Any, Any], step: int) -> tuple[Any, Any, Any]:
    """One task's support set `(inputs, targets, weights)` at an inner step."""
    if problem.tasks.per_step is None:
        return given
    inputs, targets, weights = given
    return *map_tensors(lambda leaf: leaf[step], (inputs, targets)), weights


def with_prox(
    problem: Problem,
    rule: InnerOptimizer,
    gradients: Mapping[str, Tensor | None],
    state: Any,
    here: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    step: int,
) -> dict[str, Tensor | None]:
    """One task's gradients with those of the proximal term; a constant in first order.

    Where an entry has not left its start the two ends of the term's derivative cancel, and do so
    exactly only where both are left out: at the first step, and where the rule says so.
    """
    prox = problem.inner.prox
    if not prox or not step:
        return {**gradients}
    pulls = {name: prox * (here[name] - start[name]) for name in gradients}
    if not problem.second_order:
        pulls = {name: pull.detach() for name, pull in pulls.items()}
    found = {n: pulls[n] if g is None else g + pulls[n] for n, g in gradients.items()}
    for name, still in rule.still(found, state).items():
        gradient, pull = gradients[name], torch.where(still, 0.0, pulls[name])
        found[name] = pull if gradient is None else gradient + pull
    return {**found}


def stepped(
    problem: Problem,
    rule: InnerOptimizer,
    gradients: Mapping[str, Tensor | None],
    state: Any,
    here: dict[str, Tensor],
    rates: Mapping[str, Any],
    step: int,
) -> tuple[dict[str, Tensor], Any]:
    """One task's adapted parameters, and the rule's state, after a step (1)."""
    if problem.inner.optimizer.is_plain:  # which leaves what the loss does not reach as it is
        moving = {name: g for name, g in gradients.items() if g is not None}
        return {**here, **{n: here[n] - rates[n] * g for n, g in moving.items()}}, state
    zeros = {n: torch.zeros_like(here[n]) if g is None else g for n, g in gradients.items()}
    return rule.update(zeros, state, here, rates, step)
