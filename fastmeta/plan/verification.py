"""The verification of an executor: nothing but plain autograd is trusted unseen."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from fastmeta.executors.base import Executor, Offer
from fastmeta.executors.every import REFERENCE
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.layers.layer import plus
from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.reading import Reading
from fastmeta.network.stateless import StatelessModel
from fastmeta.tasks import Examples, TaskBatch, map_tensors

_EXAMPLES = 8
"""Of a set: plain autograd's graphs over more would be the peak of memory."""


def failure(reading: Reading, problem: Problem, executor: Executor) -> str | None:
    """Compare an executor with plain autograd on two tasks and one step; why it fails, or None."""
    # A second step shows what an update rule keeps of the first.
    small = problem.shortened(2, steps=1 if problem.inner.optimizer.is_plain else 2)
    loss = reading.loss
    # A loss's weights may be one an example.
    if executor.replaces_module and loss and not {"weight", "pos_weight"} & {*loss.options}:
        small = replace(small, tasks=small.tasks.shortened(_EXAMPLES))
    reason = _failure(reading, small, executor)
    if reason is None or not executor.replaces_module or small.task_weights.dtype != torch.float32:
        return reason
    # Of a deep network's many corners rounding turns some: in float64 it does not.
    if loss and any(isinstance(option, Tensor) for option in loss.options.values()):
        return reason
    return _failure(reading, _in_double(small), executor) and reason


def keeping_fails(reading: Reading, problem: Problem, executor: Executor) -> str | None:
    """Compare features kept with features computed at every pass; why they can't be, or None.

    The reference's are compared too: it alone sees a body that reads an adapted parameter unseen.
    """
    small = problem.shortened(2, steps=2, evaluate_all=True)
    for tried in dict.fromkeys((REFERENCE, executor)):
        run = _offer(reading, small, tried).run
        outcomes: list[Outcome] = []
        for keep in (False, True):
            drawn = random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
            given = replace(small, keeps_features=keep, must_keep_features=keep)
            with same_random_numbers(small.task_weights.device):
                try:
                    outcomes.append(run(given))
                except RuntimeError as error:
                    return _first_line(error)
            if drawn != (random.getstate(), str(numpy.random.get_state())):  # noqa: NPY002
                return "a forward pass draws random numbers outside torch"
        reason = _changed(*outcomes)
        if reason:
            return reason
    return None


def linearization_fails(
    reading: Reading, problem: Problem, executor: Executor, parameters: Tensors
) -> str | None:
    """Compare an executor's linearization with autograd on two tasks; why it fails, or None."""
    small = problem.shortened(2, steps=0)
    some = {name: parameter[:2] for name, parameter in parameters.items()}
    with same_random_numbers(problem.task_weights.device):
        vectors = {name: torch.randn_like(parameter) for name, parameter in some.items()}
    ours, theirs = (e.linearize(reading, small, some) for e in (executor, REFERENCE))
    assert isinstance(ours, Linearized)
    assert isinstance(theirs, Linearized)
    pairs = [(ours.losses, theirs.losses)]
    for found, expected in (
        (ours.gradients, theirs.gradients),
        (ours.product(vectors), theirs.product(vectors)),
    ):
        pairs += [(found.get(n, torch.zeros_like(e)), e) for n, e in expected.items()]
    error = _apart([one for one, _ in pairs], [other for _, other in pairs])
    return None if error < _tolerance(theirs.losses) else f"it disagrees by {error:.1e}"


def _changed(reference: Outcome, kept: Outcome) -> str | None:
    """Why the outcome with features kept is not the other's: operators and numbers are the same."""
    for ours, theirs in (
        (kept.step_losses, reference.step_losses),
        (kept.support_losses, reference.support_losses),
    ):
        if _apart([ours], [theirs]) > min(2e-2, 1e3 * torch.finfo(theirs.dtype).eps):
            return "what it gives changes from pass to pass"
    return _disagreement(kept, reference)


def _in_double(problem: Problem) -> Problem:
    """The same problem in float64."""

    def double(leaf: Tensor) -> Tensor:
        return leaf.detach().double() if leaf.is_floating_point() else leaf

    def examples(given: Examples | None) -> Examples | None:
        if given is None:
            return None
        parts = (given.inputs, given.targets, given.weights)
        inputs, targets, weights = map_tensors(double, parts)
        return replace(given, inputs=inputs, targets=targets, weights=weights)

    model = problem.model
    tasks = problem.tasks
    support = examples(tasks.support)
    assert support is not None
    return replace(
        problem,
        model=StatelessModel(copy.deepcopy(model.module).double(), model.written),
        tasks=TaskBatch(support, examples(tasks.query)),
        task_weights=problem.task_weights.double(),
    )


def _failure(reading: Reading, small: Problem, executor: Executor) -> str | None:
    """Why it fails on this problem; None where it does not."""
    with same_random_numbers(small.task_weights.device), warnings.catch_warnings():
        # The slow batching fallback announces itself so; it is a loop with overhead.
        warnings.filterwarnings("error", message=".*performance drop.*")
        try:
            outcome = _offer(reading, small, executor).run(small)
        except Exception as error:  # a missing rule shows as any exception
            return _first_line(error)
    if small.draws_random and not executor.replaces_module:
        return None  # one that does draws what plain autograd draws
    reference = _reference(reading, small)
    reason = _disagreement(outcome, reference)
    if reason and executor.replaces_module and small.task_weights.dtype == torch.float64:
        return None if _is_rounding(outcome, reading, small, reference) else reason
    return reason


def _reference(reading: Reading, problem: Problem) -> Outcome:
    with same_random_numbers(problem.task_weights.device):
        return _offer(reading, problem, REFERENCE).run(problem)


def _is_rounding(outcome: Outcome, reading: Reading, problem: Problem, reference: Outcome) -> bool:
    """Return whether the last digits of the parameters move plain autograd about as far.

    So they do in a chaotic network: sin(30 x) behind weights of ordinary size.
    """
    module = copy.deepcopy(problem.model.module)
    eps = torch.finfo(torch.float64).eps
    with torch.no_grad(), same_random_numbers(problem.task_weights.device):
        for parameter in module.parameters():
            parameter.mul_(1 + eps * torch.randn_like(parameter).clamp(-2, 2))
    moved = replace(problem, model=StatelessModel(module, problem.model.written))
    change = _distance(_reference(reading, moved), reference)
    return _distance(outcome, reference) <= 64 * change < 1e-2


def _distance(outcome: Outcome, reference: Outcome) -> float:
    """The relative error, gradients compared in their order."""
    ours, theirs = ([gradient for _, gradient in each.gradients] for each in (outcome, reference))
    apart = _apart(ours, theirs) if len(ours) == len(theirs) else float("inf")
    return max(apart, _apart([outcome.step_losses], [reference.step_losses]))


def _offer(reading: Reading, problem: Problem, executor: Executor) -> Offer:
    """The offer of an executor for a problem that is part of one it can compute."""
    offer = executor.offer(reading, problem)
    if not isinstance(offer, Offer):
        raise RuntimeError(offer.reason)
    return offer


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _disagreement(outcome: Outcome, reference: Outcome) -> str | None:
    """Catches a wrong rule, not rounding: a ReLU or a max at a tie may fall either way."""
    losses = reference.step_losses
    tolerance = _tolerance(losses)
    # A gradient that would be zero but for rounding has no relative error worth the name.
    rounding = 8 * torch.finfo(losses.dtype).eps * float(losses.nan_to_num(0, 0, 0).abs().max())
    losses_apart = _apart([outcome.step_losses], [losses])
    ours, theirs = _by_leaf(outcome), _by_leaf(reference)
    gradients_apart = _apart(
        [ours.get(leaf) for leaf in theirs],
        [*theirs.values()],
        smallest=rounding / tolerance,
    )
    error = max(losses_apart, gradients_apart)
    return f"it disagrees with autograd by {error:.1e}" if error > tolerance else None


def _tolerance(losses: Tensor) -> float:
    return {torch.float64: 1e-6, torch.float32: 2e-2}.get(losses.dtype, 0.25)


def _by_leaf(outcome: Outcome) -> dict[int, Tensor | None]:
    """The gradient of each leaf, by its identity; one that stands there several times is added."""
    found: dict[int, Tensor | None] = {}
    for leaf, gradient in outcome.gradients:
        found[id(leaf)] = plus(found.get(id(leaf)), gradient)
    return found


def _apart(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], smallest: float = 0.0
) -> float:
    """The error relative to the whole, or to `smallest` if that is more."""
    error = scale = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is None and b is None:
            continue
        left = torch.zeros_like(b) if a is None else a  # pyright: ignore[reportArgumentType]
        right = torch.zeros_like(left) if b is None else b
        left, right = left.detach().double().nan_to_num(), right.detach().double().nan_to_num()
        error += float((left - right).square().sum())
        scale += float(right.square().sum())
    scale = max(scale, smallest**2)
    return (error / scale) ** 0.5 if scale else error**0.5
