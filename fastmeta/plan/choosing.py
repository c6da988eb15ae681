"""Chooses who computes a step: the kernels that serve it, by estimate, after their trial."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastmeta.executors import fused, generic, layered
from fastmeta.executors.problem import Problem
from fastmeta.plan import chosen as kernels
from fastmeta.plan import cost, timing, trial
from fastmeta.plan.chosen import Chosen
from fastmeta.plan.plan import Plan


@dataclass(eq=False)
class Entry:
    """A plan with what has been learnt of it since: the forms that passed their trial."""

    plan: Plan
    trusted: set[str]
    features: dict[str, str] = field(default_factory=dict)
    """By form, why it does not run once what stands in front of the adapting parameters;
    empty where it does."""
    factors: tuple[tuple[str, float], ...] | None = None
    """By form that was timed, its seconds over those estimated; None before any was."""


def choose(entry: Entry, problem: Problem, unseen: str, low_memory: bool, executor: str) -> Chosen:
    """Tries what is estimated to be the fastest until one passes its trial.

    **Raises** `ValueError` where the executor that was asked for can't serve.
    """
    plan, tasks, inner = entry.plan, problem.tasks, problem.inner
    not_fused = _not_fused(problem, plan, unseen, low_memory, executor)
    not_layered = _not_layered(problem, plan, unseen, executor)
    kernel = None if not_fused else kernels.kernel(problem, plan, low_memory)
    not_compiled = kernels.not_compiled(problem, plan, low_memory) if not not_layered else ""
    sizes = cost.Sizes(
        tasks.rounded,
        tasks.support.count,
        tasks.query.count if tasks.query else 0,
        inner.steps,
        problem.differentiate and not inner.first_order,
        low_memory,
        kernel.group if kernel else (0, 0, 0.0),
        factors=entry.factors or (),
    )
    while True:
        unavailable = entry.plan.unavailable
        not_fused = not_fused or unavailable.get("fused")
        not_layered = not_layered or unavailable.get("layered-torch")
        not_compiled = not_compiled or unavailable.get("layered-cpu")
        not_triton = unavailable.get("layered-triton") or unavailable.get("layered-triton-on-host")
        way = None
        if not not_layered:
            way = kernels.way(problem, plan, not_compiled, low_memory, not_triton)
        sizes = replace(
            sizes,
            compiled=isinstance(way, layered.Kernel),
            rules=plan.profile.has_convolution and problem.task_weights.device.type == "cpu",
        )
        why = {"fused": not_fused, "layered": not_layered}
        if executor in why:
            if why[executor]:
                raise ValueError(
                    f"executor: {executor!r} can't serve: {why[executor]}; use 'auto' or 'generic'"
                )
            choice = cost.Choice(executor, tasks.tasks, f'executor="{executor}"')
        else:
            out = {form: reason for form, reason in why.items() if reason}
            choice = cost.choose(entry.plan.profile, sizes, {**unavailable, **out})
            if entry.factors is None and _worth_timing(problem, choice, sizes, unavailable):
                rules = way if sizes.rules and isinstance(way, layered.Program) else None
                given = Chosen(entry.plan, choice, sizes, not_fused, not_layered, kernel, rules)
                entry.factors = _timed(entry, problem, given)
                sizes = replace(sizes, factors=entry.factors)
                continue
        chosen = Chosen(entry.plan, choice, sizes, not_fused, not_layered, kernel, way)
        form = chosen.executor if chosen.layered else choice.form
        tried = chosen.executor if chosen.fused else form
        if form == "loop" or tried in entry.trusted:
            return chosen if chosen.executor != "generic" else _keeping(entry, problem, chosen)
        reason = trial.failure(problem, chosen, low_memory)
        if reason is None:
            entry.trusted.add(tried)
        else:
            entry.plan = entry.plan.without(form, reason)


def _worth_timing(
    problem: Problem, choice: cost.Choice, sizes: cost.Sizes, unavailable: dict[str, str]
) -> bool:
    """Return whether the estimates leave open which form is the fastest."""
    if sizes.low_memory or not timing.may_time(problem):
        return False
    if choice.form == "layered":
        return not sizes.compiled
    return choice.form in ("loop", "vmap") and "vmap" not in unavailable and sizes.tasks > 1


def _timed(entry: Entry, problem: Problem, given: Chosen) -> tuple[tuple[str, float], ...]:
    """The factors of the loop, and of what passes its trial beside it."""
    profile, sizes = entry.plan.profile, given.sizes
    forms = {"loop": 1}
    if sizes.tasks > 1 and "vmap" not in entry.plan.unavailable and cost.close(profile, sizes):
        forms["vmap"] = cost.chunk_size(profile, sizes)
    if isinstance(given.way, layered.Program):
        forms["layered"] = given.way.chunk
    factors: list[tuple[str, float]] = []
    for form, chunk in forms.items() if len(forms) > 1 else ():
        tried = replace(given, plan=entry.plan, choice=cost.Choice(form, chunk, ""))
        name = tried.executor if form == "layered" else form
        reason = None
        if form != "loop" and name not in entry.trusted:
            reason = trial.failure(problem, tried, low_memory=False)
        if reason is not None:
            entry.plan = entry.plan.without(name, reason)
            continue
        entry.trusted.add(name)
        if form != "layered":
            tried = _keeping(entry, problem, tried)
        factors.append((form, timing.factor(problem, tried)))
    return tuple(factors)


def _keeping(entry: Entry, problem: Problem, chosen: Chosen) -> Chosen:
    """The choice with features kept, where that pays and passes its trial."""
    form = chosen.choice.form
    if not generic.worth_keeping(problem, form):
        return chosen
    if form not in entry.features:
        reason = trial.keeping_fails(problem, form, chosen.choice.chunk)
        entry.features[form] = reason or ""
    return replace(chosen, features=entry.features[form])


def _not_fused(
    problem: Problem, plan: Plan, unseen: str, low_memory: bool, executor: str
) -> str | None:
    if executor in ("generic", "layered"):
        return f"executor={executor!r} was asked for"
    if isinstance(plan.recipe, str):
        return plan.recipe
    return fused.declines(problem, plan.recipe, low_memory) or unseen or None


def _not_layered(problem: Problem, plan: Plan, unseen: str, executor: str) -> str | None:
    if executor in ("generic", "fused"):
        return f"executor={executor!r} was asked for"
    if isinstance(plan.layers, str):
        return plan.layers
    return layered.declines(problem, plan.layers) or unseen or None
