"""A form's trial: nothing but the loop is trusted unseen."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from fastmeta.executors import fused, generic, layered
from fastmeta.executors.problem import (
    Outcome,
    Problem,
    StatelessModel,
    same_random_numbers,
)
from fastmeta.plan.chosen import Chosen, kernel, run, way
from fastmeta.tasks import Examples, TaskBatch, map_tensors

_EXAMPLES = 8
"""Of an image network: the loop's graphs over more would be the peak of memory."""


def failure(problem: Problem, chosen: Chosen, low_memory: bool) -> str | None:
    """Runs a form on two tasks and one step, and compares it with the loop; why it fails, or None.

    The loop is plain autograd and right by construction; nothing else is trusted unseen.
    """
    inner = problem.inner
    if inner.steps > 1:
        inner = replace(inner, steps=1, step_weights=(0.0, 1.0), learned_step_weights=None)
    tasks = problem.tasks.first(2)
    loss = chosen.plan.loss
    if chosen.layered and loss and not {"weight", "pos_weight"} & {*loss.options}:
        # Weights of a loss may be one an example.
        tasks = tasks.shortened(_EXAMPLES)
    small = replace(
        problem, tasks=tasks, inner=inner, task_weights=problem.task_weights[: tasks.tasks]
    )
    reason = _tried(small, chosen, low_memory)
    if reason is None or not chosen.layered or small.task_weights.dtype != torch.float32:
        return reason
    # Of a deep network's many corners rounding turns some: in float64 it does not.
    if loss and any(isinstance(option, Tensor) for option in loss.options.values()):
        return reason
    return _tried(_in_double(small), chosen, low_memory) and reason


def keeping_fails(problem: Problem, form: str, chunk: int) -> str | None:
    """Compares a form that keeps features with the same that does not; why it fails, or None.

    The loop's is compared too: it alone sees a body that reads an adapted parameter unseen.
    """
    steps = min(problem.inner.steps, 2)
    inner = replace(
        problem.inner, steps=steps, step_weights=(1.0,) * (steps + 1), learned_step_weights=None
    )
    tasks = problem.tasks.first(2)
    small = replace(
        problem, tasks=tasks, inner=inner, task_weights=problem.task_weights[: tasks.tasks]
    )
    if form == "vmap" and problem.draws_random:
        return "a forward pass draws random numbers"
    for tried in dict.fromkeys(("loop", form)):
        outcomes: list[Outcome] = []
        for keep in (False, True):
            drawn = random.getstate(), str(numpy.random.get_state())  # noqa: NPY002
            with same_random_numbers(small.task_weights.device):
                try:
                    outcomes.append(generic.run(small, tried, chunk, keep))
                except (generic.NotKept, RuntimeError) as error:
                    return str(error).strip().partition("\n")[0][:160]
            if drawn != (random.getstate(), str(numpy.random.get_state())):  # noqa: NPY002
                return "a forward pass draws random numbers outside torch"
        reason = _changed(*outcomes)
        if reason:
            return reason
    return None


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


def _tried(small: Problem, chosen: Chosen, low_memory: bool) -> str | None:
    """Why it fails on this problem; None where it does not."""
    by: fused.Kernel | layered.Way | None = None
    if chosen.fused:
        by = kernel(small, chosen.plan, False, chosen.fused)
    elif chosen.layered:
        tried = chosen.layered
        rules = isinstance(tried, layered.Program)
        not_compiled = "its rules are tried" if rules else None
        by = way(
            small, chosen.plan, not_compiled, low_memory, tried.not_triton if rules else None
        )  # fmt: skip
    with same_random_numbers(small.task_weights.device), warnings.catch_warnings():
        # The slow batching fallback announces itself so; it is a loop with overhead.
        warnings.filterwarnings("error", message=".*performance drop.*")
        try:
            outcome = run(small, by, chosen.choice.form, 2)
        except Exception as error:  # a missing rule shows as any exception
            lines = str(error).strip().splitlines()
            return lines[0][:160] if lines else type(error).__name__
    if small.draws_random:
        return None
    with same_random_numbers(small.task_weights.device):
        reference = generic.run(small, "loop", 1, keep=False)
    return _disagreement(outcome, reference)


def _disagreement(outcome: Outcome, reference: Outcome) -> str | None:
    """Catches a wrong rule, not rounding: a ReLU or a max at a tie may fall either way."""
    losses = reference.step_losses
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-2}.get(losses.dtype, 0.25)
    # A gradient that would be zero but for rounding has no relative error worth the name.
    rounding = 8 * torch.finfo(losses.dtype).eps * float(losses.nan_to_num(0, 0, 0).abs().max())
    losses_apart = _apart([outcome.step_losses], [losses])
    gradients_apart = _apart(
        [g for _, g in outcome.gradients],
        [g for _, g in reference.gradients],
        smallest=rounding / tolerance,
    )
    error = max(losses_apart, gradients_apart)
    return f"it disagrees with autograd by {error:.1e}" if error > tolerance else None


def _apart(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], smallest: float = 0.0
) -> float:
    """The error relative to the whole, or to `smallest` if that is more.

    Captured leaves, which only the loop has, are left out.
    """
    error = scale = 0.0
    for a, b in zip(ours, theirs, strict=False):
        if a is None and b is None:
            continue
        left = torch.zeros_like(b) if a is None else a  # pyright: ignore[reportArgumentType]
        right = torch.zeros_like(left) if b is None else b
        left, right = left.detach().double().nan_to_num(), right.detach().double().nan_to_num()
        error += float((left - right).square().sum())
        scale += float(right.square().sum())
    scale = max(scale, smallest**2)
    return (error / scale) ** 0.5 if scale else error**0.5
