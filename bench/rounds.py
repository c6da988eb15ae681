"""Times of many contenders in one process: round robin, in short bursts.

The rule, the same for all: in every round each contender in turn, in a shuffled order, makes a
*burst* of calls, as many as fill 20 ms, at least 1 and at most 50, of which the median counts.
Caches and branch predictors are then as warm as in a training loop, while a slow spell of a
shared machine still hits everybody. A contender takes part in as many rounds as fill its share of
seconds, at least 3 and at most 60; one with fewer rounds is spread evenly over the whole run.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

BURST_SECONDS = 0.02
MOST_CALLS = 50
LEAST_ROUNDS, MOST_ROUNDS = 3, 60


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the quartiles over rounds of the bursts' medians."""

    ms: float
    lower: float
    upper: float
    rounds: int
    calls: int
    """In one burst."""


@dataclass
class _Contender:
    call: Callable[[], object]
    calls: int
    rounds: int
    samples: list[float]

    def burst(self) -> None:
        times: list[float] = []
        for _ in range(self.calls):
            start = time.perf_counter()
            self.call()
            times.append(1e3 * (time.perf_counter() - start))
        self.samples.append(median(times))

    def timing(self) -> Timing:
        lower, _, upper = quantiles(self.samples, n=4, method="inclusive")
        return Timing(median(self.samples), lower, upper, len(self.samples), self.calls)


def plan(call_seconds: float, seconds: float) -> tuple[int, int]:
    """Calls in a burst, and rounds, for a contender whose call takes so long."""
    calls = min(max(math.ceil(BURST_SECONDS / call_seconds), 1), MOST_CALLS)
    rounds = int(seconds / (calls * call_seconds))
    return calls, min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)


def takes_part(turn: int, rounds: int, all_rounds: int) -> bool:
    """Whether a contender with so many rounds has one in this turn: evenly spread."""
    return (turn + 1) * rounds // all_rounds > turn * rounds // all_rounds


def times(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """The timing of each contender, `seconds` being the share of one."""
    contenders = {
        name: _Contender(call, *plan(_estimate(call), seconds), []) for name, call in calls.items()
    }
    most = max((c.rounds for c in contenders.values()), default=0)
    order = list(contenders.values())
    shuffle = random.Random(0).shuffle
    for turn in range(most):
        shuffle(order)
        for contender in order:
            if takes_part(turn, contender.rounds, most):
                contender.burst()
    return {name: contender.timing() for name, contender in contenders.items()}


def _estimate(call: Callable[[], object]) -> float:
    """Seconds a call: the better of two, unless the first shows that there is no hurry."""
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        if best > 10 * BURST_SECONDS:
            break
    return best
