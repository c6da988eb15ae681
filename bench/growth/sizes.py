"""The time of a whole step by tasks, inner steps and width, beside the plain loop."""

from __future__ import annotations

from collections.abc import Iterator

from bench import fused, rounds, table
from bench.growth import steps

TASKS = {"1-w-w-1": (25, 100, 400, 1000, 4000, 10000), "784-w-10": (25, 100, 400, 1000)}
STEPS = (1, 2, 5, 10, 20)
WIDTHS = (16, 32, 64, 128, 256, 512, 1024)
LOOP_TASKS, LOOP_WIDTH = 100, 256
"""Up to which the plain loop is measured too: beyond, one call takes seconds."""

Point = tuple[str, str, int]
"""A network, what varies, and its value."""


def points(quick: bool) -> Iterator[Point]:
    for network in steps.NETWORKS:
        for varies, values in (("tasks", TASKS[network]), ("steps", STEPS), ("width", WIDTHS)):
            for value in values[:3:2] if quick else values:
                yield network, varies, value


def measure(point: Point, seconds: float) -> table.Record:
    network, varies, value = point
    workload = steps.at(network, **{varies: value})
    fused.check(workload.with_tasks(2))
    width = value if varies == "width" else 0
    with_loop = workload.tasks <= LOOP_TASKS and width <= LOOP_WIDTH
    contenders = ["fused", "plain loop"] if with_loop else ["fused"]
    calls = {name: steps.whole(workload, name) for name in contenders}
    timings = rounds.times(calls, seconds)
    return {
        "network": network,
        "varies": varies,
        "value": value,
        "tasks": workload.tasks,
        "steps": workload.steps,
        "ms": {name: timing.ms for name, timing in timings.items()},
    }


def markdown(records: list[table.Record]) -> str:
    header = [
        "network", "what grows", "fused, ms", "us per task and step", "plain loop, ms",
        "loop / fused",
    ]  # fmt: skip
    symbols = {"tasks": "T", "steps": "K", "width": "w"}
    rows = []
    for r in records:
        ours, loop = r["ms"]["fused"], r["ms"].get("plain loop")
        each = 1e3 * ours / (r["tasks"] * r["steps"])
        rows.append([
            r["network"], f"{symbols[r['varies']]} = {r['value']}", table.ms(ours),
            f"{each:.2f}",
            *(("–", "–") if loop is None else (table.ms(loop), f"{loop / ours:.0f}")),
        ])  # fmt: skip
    return table.markdown(header, rows)
