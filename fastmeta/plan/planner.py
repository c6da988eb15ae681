"""Makes plans and keeps them, and computes what was planned."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.executors import fused, generic, packing
from fastmeta.executors.call import WrongLabel
from fastmeta.executors.problem import (
    FormUnavailable,
    Outcome,
    Problem,
    StatelessModel,
    same_random_numbers,
    swapping,
)
from fastmeta.inner_loop import InnerLoop
from fastmeta.plan import chosen as kernels
from fastmeta.plan import losses, reader
from fastmeta.plan.choosing import Entry, choose
from fastmeta.plan.chosen import Chosen, run
from fastmeta.plan.cliff import warn_of_cliff
from fastmeta.plan.layers import Network
from fastmeta.plan.plan import Plan, objective
from fastmeta.plan.profile import profile
from fastmeta.plan.recognition import identity, recognise
from fastmeta.plan.snapshot import Snapshot, snapshot
from fastmeta.tasks import TaskBatch
from fastmeta.warning import warn

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
        with swapping:
            seen = snapshot(model)
        if not seen.compiled:
            yield seen
            return
        with torch.compiler.set_stance("force_eager"):
            yield seen


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
    loss = recognise(loss_fn)
    device = task_weights.device.type
    on_cpu = seen.known(("on cpu", device), lambda: fused.on_cpu(task_weights.device))
    asked = (
        (loss.structure if loss else identity(loss_fn), seen.signs()),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        task_weights.dtype, inner.signature, differentiate, low_memory, executor,
        packing.watched(),
    )  # fmt: skip

    def problem(plan: Plan, keeps_features: bool = False) -> Problem:
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
            unread=plan.unread,
            keeps_features=keeps_features,
        )

    def find() -> Chosen:
        entry = seen.known(
            _fingerprint(tasks, inner, asked),
            lambda: Entry(_make(model, loss_fn, loss, tasks, seen.constants), set()),
        )
        if not entry.plan.is_at(loss, seen.constants):
            entry.plan = entry.plan.at(loss, seen.constants)
        _check_targets(loss, tasks, entry.plan.profile.prediction)
        found = choose(entry, problem(entry.plan), seen.unseen, low_memory, executor)
        if executor == "auto" and not low_memory:
            warn_of_cliff(model, found)
        return found

    # A GPU's kernels are launched for so many tasks.
    count = tasks.rounded if on_cpu else tasks.tasks
    signature = tasks.signature
    latest = (
        [find()] if signature is None else seen.known((signature, count, asked), lambda: [find()])
    )
    chosen = latest[0]
    if not chosen.plan.is_at(loss, seen.constants):
        plan = chosen.plan.at(loss, seen.constants)
        latest[0] = chosen = _at(chosen, problem(plan), plan, low_memory)
    if chosen.executor in ("generic", "layered-torch"):  # a kernel looks at the labels itself
        _check_targets(loss, tasks, chosen.plan.profile.prediction)
    return Planned(problem(chosen.plan, chosen.features == ""), chosen)


def _at(chosen: Chosen, problem: Problem, plan: Plan, low_memory: bool) -> Chosen:
    """The same choice for a plan that differs in options alone."""
    by = chosen.fused or chosen.layered
    if by is None:
        return replace(chosen, plan=plan)
    like = kernels.like(problem, plan, by, low_memory)
    if chosen.fused:
        return replace(chosen, plan=plan, kernel=like)
    return replace(chosen, plan=plan, way=like)


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
        outcome = run(problem, by, choice.form, choice.chunk)
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


def _fingerprint(tasks: TaskBatch, inner: InnerLoop, asked: tuple[Any, ...]) -> Hashable:
    """What a plan depends on; a plan with another fingerprint is stale."""
    loss, autocast, _, _, differentiate, *_ = asked
    data = tuple(
        (leaf.shape[2:], leaf.dtype, leaf.device, leaf.requires_grad)
        for examples in tasks.sets()
        for leaf in examples.leaves()
    )
    masked = tasks.support.weights is not None
    return (
        data, loss, autocast, masked, inner.adapted, inner.first_order, differentiate,
    )  # fmt: skip


def _make(
    model: nn.Module, loss_fn: Callable[..., Any], loss: losses.Loss | None, tasks: TaskBatch,
    constants: Mapping[str, float],
) -> Plan:  # fmt: skip
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
    shape = tuple(example.shape[1:]) if isinstance(example, Tensor) else ()
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unread = frozenset(sizes.keys() - network.parameters()) if network else frozenset[str]()
    return Plan(measured, network, loss, dict(constants), shape, sizes, unread, why)


def _warn_of_unwritten_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and not module.training
            and module.num_batches_tracked is not None
            and int(module.num_batches_tracked) == 0
        ):
            warn(
                f"{name or 'model'}: batch norm in eval() uses running statistics that were never "
                "written; fastmeta does not write them. Use train(), or "
                "track_running_stats=False, for the statistics of the set at hand."
            )
            return
