"""Time on a device: medians of single calls, by events on the stream and by the host's clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Medians, milliseconds."""

    ms: float
    """Between two events around a call; of a host that plays the device, as `waited_ms`."""
    waited_ms: float
    """Until the host has the result: what a library is compared by that has no such events."""
    calls: int


def times(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float, waits: bool = False
) -> Timing:
    """Of calls in turn, each over other data; `waits`: they wait for the device themselves."""
    on_device = device.type == "cuda"

    def wait() -> None:
        if on_device and not waits:
            torch.cuda.synchronize(device)

    for call in calls:
        call()
    wait()
    turns = itertools.cycle(calls)
    waited: list[float] = []
    end = time.perf_counter() + seconds / 2
    while len(waited) < 5 or (time.perf_counter() < end and len(waited) < 2000):
        start = time.perf_counter()
        next(turns)()
        wait()
        waited.append(1e3 * (time.perf_counter() - start))
    if waits or not on_device:
        return Timing(median(waited), median(waited), len(waited))
    count = max(5, min(2000, int(500 * seconds / median(waited))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        next(turns)()
        event.record()
    torch.cuda.synchronize(device)
    between = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return Timing(median(between), median(waited), count)
