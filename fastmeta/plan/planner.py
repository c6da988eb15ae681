"""The plan of a step: the model read, an executor selected, both kept for the next step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.executors import packing
from fastmeta.executors.base import Offer, Unsupported
from fastmeta.executors.every import EXECUTORS, REFERENCE
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import FormUnavailable, Outcome, Problem, WrongLabel
from fastmeta.inner.argument import check_own_rule
from fastmeta.inner_loop import InnerLoop
from fastmeta.network import reader
from fastmeta.network.expressions.tracing import Untraceable
from fastmeta.network.graph import Network
from fastmeta.network.losses.reads import Reads, reads
from fastmeta.network.losses.recognition import identity, recognise
from fastmeta.network.losses.standard import objective
from fastmeta.network.losses.traced import TracedLoss, trace
from fastmeta.network.profile import profile
from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.reading import Losses, Reading
from fastmeta.network.stateless import StatelessModel, swapping
from fastmeta.options import Options
from fastmeta.plan.cliff import warn_of_cliff
from fastmeta.plan.selection import Entry, Selected, select
from fastmeta.plan.snapshot import Snapshot, snapshot
from fastmeta.plan.verification import linearization_fails
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


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be computed: a model as it stands, checked options and data."""

    model: nn.Module
    seen: Snapshot
    options: Options
    tasks: TaskBatch
    inner: InnerLoop
    task_weights: Tensor
    differentiate: bool
    losses: Losses = field(init=False)
    """The standard losses that the functions given are, as they are now."""
    reads: tuple[Reads | None, Reads | None] = field(init=False)
    """What the Python of others reads."""
    targets: tuple[str, ...] = ("support_y", "query_y")
    """What the caller calls the targets of each set."""

    def __post_init__(self) -> None:
        loss_fn, query_loss_fn = self.options.losses()
        read = of_query = reads(loss_fn)
        loss = query_loss = recognise(loss_fn, read)
        if query_loss_fn is not loss_fn:
            of_query = reads(query_loss_fn)
            query_loss = recognise(query_loss_fn, of_query)
        object.__setattr__(self, "losses", (loss, query_loss))
        object.__setattr__(self, "reads", (read, of_query))

    def key(self) -> Hashable:
        """All that a selection depends on, beside the model and the data."""
        options, inner, device = self.options, self.inner, self.task_weights.device.type
        return (
            self._structures(), torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device), self.task_weights.dtype, inner.signature,
            self.differentiate, options.memory, options.executor, packing.watched(),
        )  # fmt: skip

    def _structures(self) -> Hashable:
        """The forms of losses and activations."""
        given = zip(self.losses, self.reads, self.options.losses(), strict=True)
        forms = (loss.structure if loss else _form(read, own) for loss, read, own in given)
        return tuple(forms), self.seen.signs()

    def entry(self) -> Entry:
        """The reading of model and losses, with what has been learnt of it since."""
        tasks, inner, device = self.tasks, self.inner, self.task_weights.device.type
        data = tuple(
            (leaf.shape[2:], leaf.dtype, leaf.device, leaf.requires_grad)
            for examples in tasks.sets()
            for leaf in examples.leaves()
        )
        key = (
            data, self._structures(), torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device), tasks.support.weights is not None, inner.adapted,
            inner.first_order, self.differentiate,
        )  # fmt: skip
        entry = self.seen.known(key, lambda: Entry(self._read()))
        if not self.is_read_by(entry.reading):
            entry.reading = self.again(entry.reading)
        return entry

    def is_read_by(self, reading: Reading) -> bool:
        """Return whether a reading has the present options of losses and activations."""
        return reading.is_at(self.losses, self.seen.constants)

    def again(self, reading: Reading) -> Reading:
        """The same reading at the present options of losses and activations."""
        return reading.at(self.losses, self.seen.constants)

    def problem(self, reading: Reading, keeps_features: bool = False) -> Problem:
        """The problem for executors."""
        given = self.options.losses()
        support_objective = query_objective = objective(given[0], self.losses[0])
        if given[1] is not given[0]:
            query_objective = objective(given[1], self.losses[1])
        return Problem(
            model=StatelessModel(self.model, reading.profile.written_buffers, self.seen.slots),
            objective=support_objective,
            query_objective=query_objective,
            tasks=self.tasks,
            inner=self.inner,
            task_weights=self.task_weights,
            differentiate=self.differentiate,
            low_memory=self.options.memory == "low",
            may_capture=reading.may_capture or self.seen.learns_buffers,
            draws_random=reading.profile.draws_random,
            keep_adapted=self.tasks.query is None,
            has_attention=reading.profile.has_attention,
            captured=self._captured(reading),
            unread=reading.unread,
            keeps_features=keeps_features,
        )

    def _captured(self, reading: Reading) -> tuple[list[Any], list[Any]]:
        """What traced losses read beside their arguments."""
        pairs = zip(reading.traced, self.reads, strict=True)
        first, second = (
            traced.values(read) if traced is not None and read is not None else []
            for traced, read in pairs
        )
        return first, second

    def check_targets(self, prediction: tuple[int, ...] | None) -> None:
        """**Raises** `ValueError` or `TypeError` where targets don't fit the predictions."""
        _check_targets(self.losses, self.tasks, prediction, self.targets)

    def check_own_rule(self) -> None:
        """**Raises** `ValueError` where an update rule of the user's own breaks its contract."""
        inner = self.inner
        moving = {name: self.seen.parameters[name] for name in inner.adapted}
        with same_random_numbers(self.task_weights.device):  # a rule of the user's own may draw
            check_own_rule(inner.optimizer, moving, inner.rates_at(inner.fixed_rates(), 0))

    def _read(self) -> Reading:
        loss_fn = self.options.loss_fn
        found = _read(self.model, self.seen, loss_fn, self.losses, self.tasks, self.check_targets)
        return self._traced(found)

    def _traced(self, reading: Reading) -> Reading:
        """The reading with losses of the user's own as expressions, where they are such."""
        prediction = reading.profile.prediction
        if reading.network is None or prediction is None or len(prediction) > 2:
            return reading
        dtype = self.task_weights.dtype
        traced: list[TracedLoss | None] = []
        why = ""
        sets = (self.tasks.support, self.tasks.query)
        for read, loss, examples in zip(self.reads, self.losses, sets, strict=True):
            traced.append(None)
            if read is None or loss is not None or examples is None:
                continue
            try:
                traced[-1] = trace(read, prediction[1:], examples.targets, dtype)
            except Untraceable as error:
                why = why or str(error)
        return replace(reading, traced=(traced[0], traced[1]), untraceable=why)


def _form(read: Reads | None, loss_fn: Callable[..., Any]) -> Hashable:
    """The part of a loss of the user's own that a plan depends on."""
    if read is None or not read.known:
        return identity(loss_fn)
    varying = (i for i, v in enumerate(read.values) if type(v) is float or isinstance(v, Tensor))
    return read.key(frozenset(varying)), read.forms()


def prepare(request: Request) -> Planned:
    """Read the model and select an executor, or find what was read and selected before.

    **Raises** `ValueError` or `TypeError` where targets don't fit the model's predictions, and
    where the executor that was asked for can't serve.
    """
    options, tasks, seen = request.options, request.tasks, request.seen

    def find() -> _Latest:
        entry = request.entry()
        request.check_targets(entry.reading.profile.prediction)
        if request.differentiate and request.inner.steps:
            request.check_own_rule()
        selected = select(entry, request.problem(entry.reading), options.executor)
        if options.executor == "auto" and options.memory != "low":
            warn_of_cliff(request.model, selected)
        return _Latest(selected)

    # A GPU's kernels are launched for so many tasks.
    count = tasks.rounded if request.task_weights.device.type == "cpu" else tasks.tasks
    signature = tasks.signature
    key = (signature, count, request.key())
    latest = find() if signature is None else seen.known(key, find)
    selected = latest.selected
    if not request.is_read_by(selected.reading):
        reading = request.again(selected.reading)
        latest.selected = selected = _at(selected, reading, request.problem(reading))
    if not selected.offer.checks_labels:
        request.check_targets(selected.reading.profile.prediction)
    return Planned(request.problem(selected.reading, selected.features == ""), selected)


def linearize(request: Request, parameters: Tensors) -> Linearized:
    """Linearize by the first executor that can, and that agrees with autograd."""
    entry = request.entry()
    reading, problem = entry.reading, request.problem(entry.reading)
    request.check_targets(reading.profile.prediction)
    for executor in EXECUTORS:
        name = f"linearize {executor.name}"
        if not executor.takes(request.task_weights.device) or name in entry.failed:
            continue
        found = executor.linearize(reading, problem, parameters)
        if isinstance(found, Unsupported):
            continue
        if executor is REFERENCE or name in entry.trusted:
            return found
        reason = linearization_fails(reading, problem, executor, parameters)
        if reason is None:
            entry.trusted.add(name)
            return found
        entry.failed[name] = reason
    raise AssertionError("the reference computes any model")


def _at(selected: Selected, reading: Reading, problem: Problem) -> Selected:
    """The same executor for a reading that differs in options of loss and activations alone."""
    offer = selected.executor.offer(reading, problem)
    assert isinstance(offer, Offer)
    return replace(selected, reading=reading, offer=offer)


def _check_targets(
    losses: Losses, tasks: TaskBatch, prediction: tuple[int, ...] | None,
    labels: tuple[str, ...] = ("support_y", "query_y"),
) -> None:  # fmt: skip
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


def _read(
    model: nn.Module, seen: Snapshot, loss_fn: Callable[..., Any], losses: Losses,
    tasks: TaskBatch, check: Callable[[tuple[int, ...] | None], None],
) -> Reading:  # fmt: skip
    _warn_of_unwritten_statistics(model)
    measured = profile(
        model,
        objective(loss_fn, losses[0]),
        tasks,
        check=check,
    )
    network: Network | None = None
    why = ""
    inputs = tasks.support.inputs
    example = inputs.detach()[0] if isinstance(inputs, Tensor) else inputs
    with same_random_numbers(tasks.support.leaves()[0].device):
        try:
            network = reader.read(model, example)
        except reader.Unreadable as reason:
            why = str(reason)
    if network is not None and measured.draws_random and not network.draws():
        network, why = None, "a forward pass draws random numbers"
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
