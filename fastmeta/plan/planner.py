"""Makes plans, keeps them, and tries each form of the general path before it is trusted."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.executors import fused, generic, layered
from fastmeta.executors.kernel_loss import Declined
from fastmeta.executors.packing import WrongLabel
from fastmeta.executors.problem import (
    FormUnavailable,
    Outcome,
    Problem,
    StatelessModel,
    same_random_numbers,
)
from fastmeta.inner_loop import InnerLoop
from fastmeta.plan import cost, losses, reader
from fastmeta.plan.layers import Network
from fastmeta.plan.plan import Plan, objective
from fastmeta.plan.profile import profile
from fastmeta.plan.snapshot import Snapshot, snapshot
from fastmeta.tasks import TaskBatch

_KEPT_PER_MODEL = 64
_TRIAL_EXAMPLES = 8

R = TypeVar("R")


@dataclass(eq=False)
class _Entry:
    """A plan with what has been learnt of it since: the forms that passed their trial."""

    plan: Plan
    trusted: set[str]


_plans: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Entry]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()
_model_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


@contextmanager
def stepping(model: nn.Module) -> Generator[Snapshot, None, None]:
    """The model's snapshot, for one thread at a time; its torch.compile'd parts run as written.

    A pass swaps the module's parameters while it runs, and differentiates twice, which compiled
    code can't.
    """
    with _lock:
        lock = _model_locks.get(model)
        if lock is None:
            lock = _model_locks[model] = threading.RLock()
    with lock:
        seen = snapshot(model)
        if not seen.compiled:
            yield seen
            return
        with torch.compiler.set_stance("force_eager"):
            yield seen


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
        return "layered-cpu" if isinstance(self.layered, layered.Kernel) else "layered-torch"


@dataclass(frozen=True, eq=False)
class Planned:
    """A problem with what was chosen for it."""

    problem: Problem
    chosen: Chosen


def prepare(
    model: nn.Module,
    seen: Snapshot,
    loss_fn: Callable[[Any, Any], Tensor],
    tasks: TaskBatch,
    inner: InnerLoop,
    task_weights: Tensor,
    *,
    differentiate: bool,
    low_memory: bool,
    executor: str = "auto",
) -> Planned:
    """Finds or makes the plan, and chooses the form that computes this step.

    **Raises** `ValueError` or `TypeError` where targets don't fit the model's predictions, and
    where the executor that was asked for can't serve.
    """
    loss = losses.recognise(loss_fn)
    device = task_weights.device.type
    asked = (
        loss.key() if loss else getattr(loss_fn, "__code__", id(loss_fn)),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        task_weights.dtype, inner.signature, differentiate, low_memory, executor,
        seen.known(("environment",), fused.environment),
    )  # fmt: skip

    def problem(plan: Plan) -> Problem:
        return Problem(
            model=StatelessModel(model, plan.profile.written_buffers, seen.slots),
            objective=objective(loss_fn, loss),
            tasks=tasks,
            inner=inner,
            task_weights=task_weights,
            differentiate=differentiate,
            may_capture=plan.may_capture or seen.learns_buffers,
            draws_random=plan.profile.draws_random,
            keep_adapted=tasks.query is None,
            has_attention=plan.profile.has_attention,
        )

    def find() -> Chosen:
        entry = _entry(model, _fingerprint(seen, tasks, inner, asked), loss_fn, loss, tasks)
        _check_targets(loss, tasks, entry.plan.profile.prediction)
        return _choose(entry, problem(entry.plan), seen.unpinned, low_memory, executor)

    signature = tasks.signature
    chosen = find() if signature is None else seen.known((signature, asked), find)
    if chosen.executor == "generic":  # a kernel looks at the labels itself
        _check_targets(loss, tasks, chosen.plan.profile.prediction)
    return Planned(problem(chosen.plan), chosen)


def _choose(
    entry: _Entry, problem: Problem, unpinned: str, low_memory: bool, executor: str
) -> Chosen:
    plan, tasks, inner = entry.plan, problem.tasks, problem.inner
    not_fused = _not_fused(problem, plan, unpinned, low_memory, executor)
    not_layered = _not_layered(problem, plan, unpinned, executor)
    kernel = None if not_fused else _kernel(problem, plan, low_memory)
    not_compiled = _not_compiled(problem, plan, low_memory) if not not_layered else ""
    sizes = cost.Sizes(
        tasks.tasks,
        tasks.support.count,
        tasks.query.count if tasks.query else 0,
        inner.steps,
        problem.differentiate and not inner.first_order,
        low_memory,
        kernel.group if kernel else (0, 0, 0.0),
    )
    while True:
        unavailable = entry.plan.unavailable
        not_fused = not_fused or unavailable.get("fused")
        not_layered = not_layered or unavailable.get("layered-torch")
        not_compiled = not_compiled or unavailable.get("layered-cpu")
        way = None if not_layered else _way(problem, plan, not_compiled, low_memory)
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
        chosen = Chosen(entry.plan, choice, sizes, not_fused, not_layered, kernel, way)
        form = chosen.executor if chosen.layered else choice.form
        tried = chosen.executor if chosen.fused else form
        if form == "loop" or tried in entry.trusted:
            return chosen
        reason = _trial(problem, chosen, low_memory)
        if reason is None:
            entry.trusted.add(tried)
        else:
            entry.plan = entry.plan.without(form, reason)


def _not_fused(
    problem: Problem, plan: Plan, unpinned: str, low_memory: bool, executor: str
) -> str | None:
    if executor in ("generic", "layered"):
        return f"executor={executor!r} was asked for"
    if isinstance(plan.recipe, str):
        return plan.recipe
    return fused.declines(problem, plan.recipe, low_memory) or unpinned or None


def _not_layered(problem: Problem, plan: Plan, unpinned: str, executor: str) -> str | None:
    if executor in ("generic", "fused"):
        return f"executor={executor!r} was asked for"
    if isinstance(plan.layers, str):
        return plan.layers
    return layered.declines(problem, plan.layers) or unpinned or None


def _kernel(
    problem: Problem, plan: Plan, low_memory: bool, like: fused.Kernel | None = None
) -> fused.Kernel:
    assert isinstance(plan.recipe, fused.Recipe)
    return fused.kernel_for(problem, plan.recipe, low_memory, like)


def _not_compiled(problem: Problem, plan: Plan, low_memory: bool) -> str | None:
    assert isinstance(plan.layers, layered.Recipe)
    return layered.not_compiled(problem, plan.layers, low_memory)


def _way(problem: Problem, plan: Plan, not_compiled: str | None, low_memory: bool) -> layered.Way:
    assert isinstance(plan.layers, layered.Recipe)
    return layered.way(problem, plan.layers, not_compiled, low_memory)


def _run(problem: Problem, by: fused.Kernel | layered.Way | None, form: str, chunk: int) -> Outcome:
    if isinstance(by, fused.Kernel):
        return fused.run(problem, by)
    return layered.run(problem, by) if by else generic.run(problem, form, chunk)


def _check_targets(
    loss: losses.Loss | None, tasks: TaskBatch, prediction: tuple[int, ...] | None
) -> None:
    if loss is None or prediction is None:
        return
    loss.check("support_y", tasks.support.targets, prediction)
    if tasks.query is not None:
        loss.check("query_y", tasks.query.targets, prediction)


def compute(planned: Planned) -> Outcome:
    """Runs the chosen form; the loop takes over where a capture turns up."""
    problem, plan, choice = planned.problem, planned.chosen.plan, planned.chosen.choice
    by = planned.chosen.fused or planned.chosen.layered
    try:
        outcome = _run(problem, by, choice.form, choice.chunk)
    except WrongLabel:
        _check_targets(plan.loss, problem.tasks, plan.profile.prediction)  # says which
        raise
    except FormUnavailable:
        outcome = generic.run(problem, "loop", 1)
    except RuntimeError as error:
        # Hooks that the caller put around this call, not around the one that was tried.
        if "saved tensor hooks" not in str(error):
            raise
        outcome = generic.run(problem, "loop", 1)
    unreached = plan.profile.unreached
    if choice.form == "vmap" and unreached:
        # functorch gives zeros where autograd gives nothing: optimizers tell the two apart.
        names = {id(p): name for name, p in problem.model.parameters().items()}
        outcome.gradients = [
            (leaf, None if names.get(id(leaf)) in unreached and _is_zero(gradient) else gradient)
            for leaf, gradient in outcome.gradients
        ]
    return outcome


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def still_reads(planned: Planned) -> bool:
    """Whether the plan's layers repeat the module on the data at hand: its Python may have changed.

    Padding relies on that; nothing else of the general path does.
    """
    network, model = planned.chosen.plan.network, planned.problem.model.module
    example = planned.problem.tasks.support.inputs
    if network is None or not isinstance(example, Tensor):
        return False
    try:
        reader.verify(network, model, example.detach()[0])
    except reader.Unreadable:
        return False
    return True


def _entry(
    model: nn.Module,
    key: Hashable,
    loss_fn: Callable[..., Any],
    loss: losses.Loss | None,
    tasks: TaskBatch,
) -> _Entry:
    with _lock:
        kept = _plans.setdefault(model, OrderedDict())
        entry = kept.get(key)
        if entry is not None:
            kept.move_to_end(key)
            return entry
    entry = _Entry(_make(model, loss_fn, loss, tasks), set())
    with _lock:
        kept[key] = entry
        while len(kept) > _KEPT_PER_MODEL:
            kept.popitem(last=False)
    return entry


def _fingerprint(
    seen: Snapshot, tasks: TaskBatch, inner: InnerLoop, asked: tuple[Any, ...]
) -> Hashable:
    """What a plan depends on; a plan with another fingerprint is stale."""
    loss, autocast, _, _, differentiate, *_ = asked
    data = tuple(
        (leaf.shape[2:], leaf.dtype, leaf.device, leaf.requires_grad)
        for examples in tasks.sets()
        for leaf in examples.leaves()
    )
    masked = tasks.support.weights is not None
    return (
        seen.key, data, loss, autocast, masked, inner.adapted, inner.first_order, differentiate,
    )  # fmt: skip


def _make(
    model: nn.Module, loss_fn: Callable[..., Any], loss: losses.Loss | None, tasks: TaskBatch
) -> Plan:
    _warn_of_unwritten_statistics(model)
    measured = profile(
        model,
        objective(loss_fn, loss),
        tasks,
        check=lambda prediction: _check_targets(loss, tasks, prediction),
    )
    network: Network | None = None
    why = ""
    inputs = tasks.support.inputs
    example = inputs.detach()[0] if isinstance(inputs, Tensor) else inputs
    if measured.draws_random:
        why = "a forward pass draws random numbers"
    else:
        with same_random_numbers(tasks.support.leaves()[0].device):
            try:
                network = reader.read(model, example)
            except reader.Unreadable as reason:
                why = str(reason)
    return Plan(
        measured,
        network,
        loss,
        why,
        _or_why(lambda: fused.recipe(network, loss, why)),
        _or_why(lambda: _layers(model, network, loss, example, why)),
    )


def _layers(
    model: nn.Module, network: Network | None, loss: losses.Loss | None, example: Any, why: str
) -> layered.Recipe:
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else ()
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return layered.recipe(network, loss, shape, sizes, why)


def _or_why(make: Callable[[], R]) -> R | str:
    """What it makes, or why it declines."""
    try:
        return make()
    except Declined as reason:
        return str(reason)


def _trial(problem: Problem, chosen: Chosen, low_memory: bool) -> str | None:
    """Runs a form on two tasks and one step, and compares it with the loop; why it fails, or None.

    The loop is plain autograd and right by construction; nothing else is trusted unseen.
    """
    inner = problem.inner
    if inner.steps > 1:
        inner = replace(inner, steps=1, step_weights=(0.0, 1.0), learned_step_weights=None)
    tasks = problem.tasks.first(2)
    loss = chosen.plan.loss
    if chosen.layered and loss and not {"weight", "pos_weight"} & {*loss.options}:
        # The loop's graphs over images are large; weights of a loss may be one an example.
        tasks = tasks.shortened(_TRIAL_EXAMPLES)
    small = replace(
        problem, tasks=tasks, inner=inner, task_weights=problem.task_weights[: tasks.tasks]
    )
    by: fused.Kernel | layered.Way | None = None
    if chosen.fused:
        by = _kernel(small, chosen.plan, False, chosen.fused)
    elif chosen.layered:
        rules = isinstance(chosen.layered, layered.Program)
        not_compiled = "its rules are tried" if rules else None
        by = _way(small, chosen.plan, not_compiled, low_memory)
    with same_random_numbers(problem.task_weights.device), warnings.catch_warnings():
        # The slow batching fallback announces itself so; it is a loop with overhead.
        warnings.filterwarnings("error", message=".*performance drop.*")
        try:
            outcome = _run(small, by, chosen.choice.form, 2)
        except Exception as error:  # a missing rule shows as any exception
            lines = str(error).strip().splitlines()
            return lines[0][:160] if lines else type(error).__name__
    if problem.draws_random:
        return None
    with same_random_numbers(problem.task_weights.device):
        reference = generic.run(small, "loop", 1)
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


def _warn_of_unwritten_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and not module.training
            and module.num_batches_tracked is not None
            and int(module.num_batches_tracked) == 0
        ):
            warnings.warn(
                f"{name or 'model'}: batch norm in eval() uses running statistics that were never "
                "written; fastmeta does not write them. Use train(), or "
                "track_running_stats=False, for the statistics of the set at hand.",
                stacklevel=4,
            )
            return
