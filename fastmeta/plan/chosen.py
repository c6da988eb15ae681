"""What was chosen for a step, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fastmeta.executors import fused, generic, layered
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.plan import cost
from fastmeta.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Chosen:
    """The plan for a model, a loss, sizes and options, and the form chosen for it: found once."""

    plan: Plan
    choice: cost.Choice
    sizes: cost.Sizes
    not_fused: str | None
    """Why the fused kernels can't serve."""
    not_layered: str | None
    """Why the layered executor can't."""
    kernel: fused.Kernel | None
    """The fused one, where it can serve."""
    way: layered.Way | None
    """That of the layered executor, where it can serve."""
    features: str | None = None
    """The reason why the general path runs what stands in front of the adapting parameters at every
    pass; empty where once a task and set, None where all adapts or there is a single pass."""

    @cached_property
    def fused(self) -> fused.Kernel | None:
        """The fused kernel, where it computes the step."""
        return self.kernel if self.choice.form == "fused" else None

    @cached_property
    def layered(self) -> layered.Way | None:
        """How the layered executor computes the step, where it does."""
        return self.way if self.choice.form == "layered" else None

    @cached_property
    def executor(self) -> str:
        """What computes the step, as `MetaStep.executor` says it."""
        if self.fused:
            return self.fused.executor
        if self.layered is None:
            return "generic"
        return "layered-cpu" if isinstance(self.layered, layered.Kernel) else self.layered.executor


def kernel(
    problem: Problem, plan: Plan, low_memory: bool, like: fused.Kernel | None = None
) -> fused.Kernel:
    """The fused kernel of a problem that it serves."""
    assert isinstance(plan.recipe, fused.Recipe)
    return fused.kernel_for(problem, plan.recipe, low_memory, like)


def not_compiled(problem: Problem, plan: Plan, low_memory: bool) -> str | None:
    """Why the layered executor would not take its compiled step; None where it would."""
    assert isinstance(plan.layers, layered.Recipe)
    return layered.not_compiled(problem, plan.layers, low_memory)


def way(
    problem: Problem, plan: Plan, not_compiled: str | None, low_memory: bool,
    not_triton: str | None = None,
) -> layered.Way:  # fmt: skip
    """How the layered executor computes a problem that it serves."""
    assert isinstance(plan.layers, layered.Recipe)
    return layered.way(problem, plan.layers, not_compiled, low_memory, not_triton)


def like(
    problem: Problem, plan: Plan, other: fused.Kernel | layered.Way, low_memory: bool
) -> fused.Kernel | layered.Way:
    """The kernel or program for a plan that differs from another's in scalar constants only."""
    if isinstance(other, fused.Kernel):
        assert isinstance(plan.recipe, fused.Recipe)
        return fused.like(problem, plan.recipe, low_memory, other)
    if isinstance(other, layered.Kernel):
        return way(problem, plan, None, low_memory)
    return way(problem, plan, other.not_compiled, low_memory, other.not_triton)


def run(problem: Problem, by: fused.Kernel | layered.Way | None, form: str, chunk: int) -> Outcome:
    """Computes the step by a kernel, or by a form of the general path."""
    if isinstance(by, fused.Kernel):
        return fused.run(problem, by)
    return layered.run(problem, by) if by else generic.run(problem, form, chunk)
