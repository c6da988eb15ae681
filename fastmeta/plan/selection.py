"""The selection of an executor: the cheapest offer that passes its verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastmeta.executors.base import COMPILED, Executor, Offer, Unsupported
from fastmeta.executors.every import EXECUTORS, REFERENCE
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading
from fastmeta.plan import timing, verification

Offers = dict[Executor, Offer]

_UNSURE = 5.0
"""The factor by which estimates of the timeable offers were found to be off."""
_MUCH = 1.1
"""How much shorter a time must be than that of the offer estimated to be the cheapest: a run beside
other processes is a surer sign of much than of little."""


@dataclass(eq=False)
class Entry:
    """A reading with what has been learnt of its executors since."""

    reading: Reading
    trusted: set[str] = field(default_factory=set)
    """The executors that passed their verification, by name."""
    failed: dict[str, str] = field(default_factory=dict)
    """The executors that did not, and why."""
    features: dict[str, str] = field(default_factory=dict)
    """By executor, why it does not run once what stands in front of the adapting parameters;
    empty where it does."""
    factors: dict[str, float] = field(default_factory=dict)
    """By executor that was timed, its seconds over those estimated."""


@dataclass(frozen=True, eq=False)
class Selected:
    """The executor for a reading, sizes and options."""

    reading: Reading
    executor: Executor
    offer: Offer
    reason: str
    """Why it was selected."""
    device: torch.device
    unsupported: Mapping[str, str]
    """By executor of the device, why it can't compute the problem."""
    features: str | None = None
    """Why the module's layers in front of the adapting parameters run at every pass; empty where
    once a task and set, None where all adapts or there is a single pass."""

    def unsupported_by(self, family: str) -> str | None:
        """The reason why no executor of a family can compute the problem; None where one can."""
        reasons = [
            self.unsupported.get(executor.name)
            for executor in EXECUTORS
            if executor.family == family and executor.takes(self.device)
        ]
        return _told(reasons) if reasons and all(reasons) else None

    def unsupported_forms(self) -> list[tuple[str, str]]:
        """The executors of the same family that can't compute the problem, by name, and why."""
        family = [e.name for e in EXECUTORS if e.family == self.executor.family]
        return [(name, self.unsupported[name]) for name in family if name in self.unsupported]


def _told(reasons: Sequence[str | None]) -> str | None:
    """The last reason of a family that says something of the problem."""
    return next((reason for reason in reversed(reasons) if reason != COMPILED), None)


def select(entry: Entry, problem: Problem, asked: str) -> Selected:
    """Verify the cheapest offers until one agrees with autograd.

    **Raises** `ValueError` where the family of executors that was asked for can't compute it.
    """
    device = problem.task_weights.device
    offers: Offers = {}
    unsupported: dict[str, str] = {}
    for executor in EXECUTORS:
        if not executor.takes(device):
            continue
        if asked not in ("auto", executor.family):
            unsupported[executor.name] = f"executor={asked!r} was asked for"
            continue
        answer = executor.offer(entry.reading, problem)
        if isinstance(answer, Unsupported):
            unsupported[executor.name] = answer.reason
        else:
            offers[executor] = answer
    while True:
        for executor in [*offers]:
            if executor.name in entry.failed:
                unsupported[executor.name] = entry.failed[executor.name]
                del offers[executor]
        if not offers:
            family = [e.name for e in EXECUTORS if e.takes(device) and e.family == asked]
            why = _told([unsupported[name] for name in family]) or f"there is none for {device}"
            raise ValueError(f"executor: {asked!r} can't serve: {why}; use 'auto' or 'generic'")
        best, reason = _cheapest(offers, entry.factors)
        rivals = _rivals(offers, best)
        untimed = {e: offer for e, offer in rivals.items() if e.name not in entry.factors}
        if untimed and len(rivals) > 1 and timing.may_time(problem):
            entry.factors.update(_timed(entry, problem, untimed))
        elif _is_trusted(entry, problem, best):
            break
    features = _features(entry, problem, best, offers[best])
    return Selected(entry.reading, best, offers[best], reason, device, unsupported, features)


def _cheapest(offers: Offers, factors: Mapping[str, float]) -> tuple[Executor, str]:
    """The executor whose offer is the cheapest, by time where that was measured; and why."""
    best = min(offers, key=lambda e: (offers[e].last_resort, offers[e].seconds))
    times = {e: factors[e.name] * o.seconds for e, o in offers.items() if e.name in factors}
    if len(times) < 2 or best not in times:
        last = offers[best].last_resort
        alike = {e: o.seconds for e, o in offers.items() if o.last_resort == last}
        return best, _said("estimated", alike)
    fastest = min(times, key=lambda e: times[e] * (1.0 if e is best else _MUCH))
    return fastest, _said("timed on some tasks", times)


def _said(how: str, times: Mapping[Executor, float]) -> str:
    if len(times) == 1:
        return "no other can compute it as asked"
    shown = (f"{1e3 * seconds:.3g} ms {executor.name}" for executor, seconds in times.items())
    return f"{how}: {', '.join(shown)}"


def _rivals(offers: Offers, best: Executor) -> Offers:
    """The offers of which only a measurement can tell which is the fastest."""
    if not offers[best].timeable:
        return {}
    most = _UNSURE * offers[best].seconds
    return {e: offer for e, offer in offers.items() if offer.timeable and offer.seconds < most}


def _timed(entry: Entry, problem: Problem, rivals: Offers) -> dict[str, float]:
    """The factors of those that pass their verification."""
    factors: dict[str, float] = {}
    for executor, offer in rivals.items():
        if _is_trusted(entry, problem, executor):
            keeps = _features(entry, problem, executor, offer) == ""
            factors[executor.name] = timing.factor(entry.reading, problem, executor, keeps)
    return factors


def _is_trusted(entry: Entry, problem: Problem, executor: Executor) -> bool:
    """Return whether it agrees with the reference; verified once."""
    name = executor.name
    if executor is REFERENCE or name in entry.trusted:
        return True
    reason = verification.failure(entry.reading, problem, executor)
    if reason is None:
        entry.trusted.add(name)
    else:
        entry.failed[name] = reason
    return reason is None


def _features(entry: Entry, problem: Problem, executor: Executor, offer: Offer) -> str | None:
    """Why features are not kept; empty where they are, None where that would spare nothing."""
    if not offer.may_keep_features:
        return None
    if executor.name not in entry.features:
        reason = verification.keeping_fails(entry.reading, problem, executor)
        entry.features[executor.name] = reason or ""
    return entry.features[executor.name]
