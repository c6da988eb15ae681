"""Whole fused steps by number of threads, each number in a fresh process.

python -m bench.growth.threads COUNT SECONDS WORKLOAD...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from statistics import median

import torch

from bench import measure as processes
from bench import rounds, table
from bench.growth import steps
from bench.workloads import WORKLOADS

COUNTS = (1, 2)


def measure(names: Sequence[str], seconds: float, repeats: int) -> list[table.Record]:
    """Medians over processes that take turns; none where there is one core."""
    if (os.cpu_count() or 1) < max(COUNTS):
        return []
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for _ in range(repeats):
        for count in COUNTS:
            found[count].append(
                processes.in_fresh_process(
                    "bench.growth.threads", str(count), str(seconds / repeats), *names
                )
            )
    return [
        {
            "workload": name,
            "ms": {str(count): median(run[name] for run in found[count]) for count in COUNTS},
        }
        for name in names
    ]


def markdown(records: list[table.Record]) -> str:
    header = ["workload", "one thread, ms", "two threads, ms", "one / two"]
    rows = [
        [r["workload"], table.ms(one), table.ms(two), f"{one / two:.2f}"]
        for r in records
        for one, two in [r["ms"].values()]
    ]
    return table.markdown(header, rows) if records else "This machine has one core."


def main() -> None:
    count, seconds, *names = sys.argv[1:]
    torch.set_num_threads(int(count))
    calls = {name: steps.whole(WORKLOADS[name]) for name in names}
    timings = rounds.times(calls, float(seconds))
    print(json.dumps({name: timing.ms for name, timing in timings.items()}))


if __name__ == "__main__":
    main()
