"""Times the forms that can serve, once a plan: what an estimate leaves out is in the figure."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fastmeta.executors.problem import Problem
from fastmeta.plan import cost
from fastmeta.plan.chosen import Chosen, run, way

_ENOUGH = 0.02
"""Seconds after which a form is not run again; the shortest of its runs counts."""


def may_time(problem: Problem) -> bool:
    """Return whether a form may be chosen by the clock: random numbers do not depend on it."""
    return not problem.draws_random and not torch.are_deterministic_algorithms_enabled()


def sample(problem: Problem, tasks: int) -> Problem:
    """The first tasks, with as few inner steps as show what one takes."""
    inner = problem.inner
    if inner.steps > 2:
        inner = replace(inner, steps=2, step_weights=(0.0, 0.0, 1.0), learned_step_weights=None)
    first = problem.tasks.first(tasks)
    return replace(
        problem, tasks=first, inner=inner, task_weights=problem.task_weights[: first.tasks]
    )


def factor(problem: Problem, chosen: Chosen) -> float:
    """Seconds of a form over its estimate, on a sample: one chunk of tasks, or two in the loop."""
    form = chosen.choice.form
    small = sample(problem, 2 if form == "loop" else chosen.choice.chunk)
    small = replace(small, keeps_features=chosen.features == "")
    rules = "its rules are timed"
    by = way(small, chosen.plan, rules, low_memory=False) if form == "layered" else None
    sizes = replace(chosen.sizes, tasks=small.tasks.tasks, steps=small.inner.steps)

    device = small.task_weights.device
    # Beside other processes, what takes longer than a slice of time looks longer still.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter

    def once() -> float:
        start = clock()
        run(small, by, form, chosen.choice.chunk)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    once()
    times = [once()]
    while sum(times) < _ENOUGH:
        times.append(once())
    return min(times) / cost.estimate(form, chosen.plan.profile, sizes, chosen.choice.chunk)
