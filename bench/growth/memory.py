"""Peak memory of a whole step by the number of tasks, each figure in a fresh process.

It is measured above what the process holds after a step of one task, so that what the first call
imports (`bench.general` has that) is left out, and what grows is seen.

python -m bench.growth.memory NETWORK TASKS CONTENDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from bench import general, table
from bench import measure as processes
from bench.growth import sizes, steps

CONTENDERS = {
    "fused": "fastmeta",
    "plain loop": "loop, backward per task",
    "torch.func vmap": "torch.func vmap",
}
"""As `bench.general` names them, whose steps have not been called when they are made."""
MOST_TASKS = {
    "plain loop": {"1-w-w-1": 100, "784-w-10": 100},
    "torch.func vmap": {"1-w-w-1": 1000, "784-w-10": 400},
}
"""Beyond, one call takes seconds, or gigabytes."""


def points(quick: bool) -> Iterator[tuple[str, int]]:
    every = [(network, tasks) for network, counts in sizes.TASKS.items() for tasks in counts]
    yield from every[:1] if quick else every


def measure(point: tuple[str, int]) -> table.Record:
    network, tasks = point
    megabytes = {
        contender: processes.in_fresh_process(
            "bench.growth.memory", network, str(tasks), contender
        )["megabytes"]
        for contender in CONTENDERS
        if tasks <= MOST_TASKS.get(contender, {}).get(network, tasks)
    }
    return {"network": network, "tasks": tasks, "megabytes": megabytes}


def markdown(records: list[table.Record]) -> str:
    header = ["network", "T", *(f"{name}, MB" for name in CONTENDERS)]
    rows = []
    for r in records:
        found = [r["megabytes"].get(name) for name in CONTENDERS]
        cells = ["–" if mb is None else f"{mb:.1f}" for mb in found]
        rows.append([r["network"], str(r["tasks"]), *cells])
    return table.markdown(header, rows)


def main() -> None:
    network, tasks, contender = sys.argv[1:]
    torch.set_num_threads(1)
    small, large = (steps.at(network, tasks=count) for count in (1, int(tasks)))
    general.step_function(CONTENDERS[contender], small, *small.make())()
    step = general.step_function(CONTENDERS[contender], large, *large.make())
    print(json.dumps({"megabytes": processes.peak_above_start(step)}))


if __name__ == "__main__":
    main()
