"""The plan of a step: the model read, an executor selected, both kept for the next step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.executors import packing
from fastmeta.executors.base import Offer
from fastmeta.executors.every import REFERENCE
from fastmeta.executors.problem import FormUnavailable, Outcome, Problem, WrongLabel
from fastmeta.inner_loop import InnerLoop
from fastmeta.network import reader
from fastmeta.network.graph import Network
from fastmeta.network.losses import standard
from fastmeta.network.losses.recognition import identity, recognise
from fastmeta.network.losses.standard import objective
from fastmeta.network.profile import profile
from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.reading import Losses, Reading
from fastmeta.network.stateless import StatelessModel, swapping
from fastmeta.options import Options
from fastmeta.plan.cliff import warn_of_cliff
from fastmeta.plan.selection import Entry, Selected, select
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
    """A problem with the executor selected for it."""

    problem: Problem
    selected: Selected


@dataclass(eq=False)
class _Latest:
    """What was selected for data of one kind, at the latest options of loss and activations."""

    selected: Selected


def prepare(
    model: nn.Module,
    seen: Snapshot,
    options: Options,
    tasks: TaskBatch,
    inner: InnerLoop,
    task_weights: Tensor,
    differentiate: bool,
) -> Planned:
    """Read the model and select an executor, or find what was read and selected before.

    **Raises** `ValueError` or `TypeError` where targets don't fit the model's predictions, and
    where the executor that was asked for can't serve.
    """
    executor, given = options.executor, options.losses()
    losses = recognise(given[0]), recognise(given[1])
    device = task_weights.device.type
    asked = (
        tuple(map(_structure, losses, given)), seen.signs(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        task_weights.dtype, inner.signature, differentiate, options.memory, executor,
        packing.watched(),
    )  # fmt: skip

    objectives = [objective(given[0], losses[0])] * 2
    if options.query_loss_fn is not None:
        objectives[1] = objective(given[1], losses[1])

    def problem(reading: Reading, keeps_features: bool = False) -> Problem:
        return Problem(
            model=StatelessModel(model, reading.profile.written_buffers, seen.slots),
            objective=objectives[0],
            query_objective=objectives[1],
            tasks=tasks,
            inner=inner,
            task_weights=task_weights,
            differentiate=differentiate,
            low_memory=options.memory == "low",
            may_capture=reading.may_capture or seen.learns_buffers,
            draws_random=reading.profile.draws_random,
            keep_adapted=tasks.query is None,
            has_attention=reading.profile.has_attention,
            unread=reading.unread,
            keeps_features=keeps_features,
        )

    def find() -> _Latest:
        entry = seen.known(
            _fingerprint(tasks, inner, asked),
            lambda: Entry(_read(model, seen, given[0], losses, tasks)),
        )
        if not entry.reading.is_at(losses, seen.constants):
            entry.reading = entry.reading.at(losses, seen.constants)
        _check_targets(losses, tasks, entry.reading.profile.prediction)
        selected = select(entry, problem(entry.reading), executor)
        if executor == "auto" and options.memory != "low":
            warn_of_cliff(model, selected)
        return _Latest(selected)

    # A GPU's kernels are launched for so many tasks.
    count = tasks.rounded if device == "cpu" else tasks.tasks
    signature = tasks.signature
    latest = find() if signature is None else seen.known((signature, count, asked), find)
    selected = latest.selected
    if not selected.reading.is_at(losses, seen.constants):
        reading = selected.reading.at(losses, seen.constants)
        latest.selected = selected = _at(selected, reading, problem(reading))
    if not selected.offer.checks_labels:
        _check_targets(losses, tasks, selected.reading.profile.prediction)
    return Planned(problem(selected.reading, selected.features == ""), selected)


def _at(selected: Selected, reading: Reading, problem: Problem) -> Selected:
    """The same executor for a reading that differs in options of loss and activations alone."""
    offer = selected.executor.offer(reading, problem)
    assert isinstance(offer, Offer)
    return replace(selected, reading=reading, offer=offer)


def _check_targets(losses: Losses, tasks: TaskBatch, prediction: tuple[int, ...] | None) -> None:
    labels = ("support_y", "query_y")
    for label, loss, examples in zip(labels, losses, tasks.given(), strict=False):
        if loss is not None and prediction is not None:
            targets = examples.targets
            if examples is tasks.per_step and isinstance(targets, Tensor):
                targets = targets.flatten(0, 1)
            loss.check(label, targets, prediction)


def compute(planned: Planned) -> Outcome:
    """Run the selected executor; plain autograd takes over where it turns out not to serve."""
    problem, reading = planned.problem, planned.selected.reading
    try:
        return planned.selected.offer.run(problem)
    except WrongLabel:
        losses = reading.loss, reading.query_loss
        _check_targets(losses, problem.tasks, reading.profile.prediction)  # says which
        raise
    except FormUnavailable:
        pass
    except RuntimeError as error:
        # Hooks that the caller put around this call, not around the one that was verified.
        if "saved tensor hooks" not in str(error):
            raise
    fallback = REFERENCE.offer(reading, problem)
    assert isinstance(fallback, Offer)
    return fallback.run(replace(problem, keeps_features=False))


def still_reads(planned: Planned) -> bool:
    """Return whether the layers repeat the module on the data at hand: its Python may have changed.

    Padding relies on that; nothing else of the general path does.
    """
    network, model = planned.selected.reading.network, planned.problem.model.module
    example = planned.problem.tasks.support.inputs
    if network is None or not isinstance(example, Tensor):
        return False
    try:
        reader.verify(network, model, example.detach()[0])
    except reader.Unreadable:
        return False
    return True


def _structure(loss: standard.Loss | None, loss_fn: Callable[..., Any]) -> Hashable:
    return loss.structure if loss else identity(loss_fn)


def _fingerprint(tasks: TaskBatch, inner: InnerLoop, asked: tuple[Any, ...]) -> Hashable:
    """All that a reading depends on, beside the model."""
    losses, signs, autocast, _, _, differentiate, *_ = asked
    data = tuple(
        (leaf.shape[2:], leaf.dtype, leaf.device, leaf.requires_grad)
        for examples in tasks.sets()
        for leaf in examples.leaves()
    )
    masked = tasks.support.weights is not None
    return (
        data, losses, signs, autocast, masked, inner.adapted, inner.first_order, differentiate,
    )  # fmt: skip


def _read(
    model: nn.Module, seen: Snapshot, loss_fn: Callable[..., Any], losses: Losses,
    tasks: TaskBatch,
) -> Reading:  # fmt: skip
    _warn_of_unwritten_statistics(model)
    measured = profile(
        model,
        objective(loss_fn, losses[0]),
        tasks,
        check=lambda prediction: _check_targets(losses, tasks, prediction),
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
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Reading(
        profile=measured,
        network=network,
        loss=losses[0],
        query_loss=losses[1],
        constants=dict(seen.constants),
        example=tuple(example.shape[1:]) if isinstance(example, Tensor) else (),
        sizes=sizes,
        unread=frozenset(sizes.keys() - network.parameters()) if network else frozenset[str](),
        unreadable=why,
        unseen=seen.unseen,
        writes=seen.writes,
    )


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
