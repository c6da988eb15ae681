"""The choice between fused and general path: estimated seconds beside measured ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench import compare, rounds, table
from bench.growth import floor, steps
from bench.workloads import WORKLOADS, Workload, mlp
from fastmeta.executors.fused.cpu import CALL
from fastmeta.executors.generic import cost


def shapes(quick: bool) -> Iterator[Workload]:
    """The workloads; then long, wide and tiny steps, where an estimate can go wrong."""
    for name in compare.MLPS[::4] if quick else compare.MLPS:
        yield WORKLOADS[name]
    if quick:
        return
    for network, options in (
        ("1-w-w-1", {"tasks": 100}), ("1-w-w-1", {"steps": 20}),
        ("1-w-w-1", {"tasks": 1, "width": 1024}), ("1-w-w-1", {"tasks": 4, "width": 256}),
        ("784-w-10", {"tasks": 1}), ("784-w-10", {"tasks": 4, "width": 1024}),
        ("784-w-10", {"width": 16}),
    ):  # fmt: skip
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        yield replace(steps.at(network, **options), name=f"{network}, {name}")
    for widths, tasks in (((784, 512, 512, 10), 4), ((784, 1024, 1024, 10), 1), ((32, 16, 10), 1)):
        name = f"{'-'.join(str(width) for width in widths)}, tasks {tasks}"
        network = lambda widths=widths: mlp(*widths)  # noqa: E731
        yield replace(
            WORKLOADS["W2b"], name=name, network=network, shape=widths[:1], tasks=tasks, query=50
        )


def measure(workload: Workload, seconds: float) -> table.Record:
    planned = steps.planned(workload, "auto")
    selected = planned.selected
    calls = {path: steps.whole(workload, path) for path in ("fused", "general")}
    timings = rounds.times(calls, seconds)
    return {
        "workload": workload.name,
        "ms": {name: timing.ms for name, timing in timings.items()},
        "estimated_ms": {
            "fused": 1e3 * (CALL + floor.kernel_of(planned).step.seconds),
            "general": 1e3 * cost.cheapest(selected.reading.profile, planned.problem),
        },
        "taken": "fused" if selected.executor.family == "fused" else "general",
    }


def lost(record: table.Record) -> float:
    """The taken path's time over that of the faster one."""
    return record["ms"][record["taken"]] / min(record["ms"].values())


def markdown(records: list[table.Record]) -> str:
    header = ["step"]
    for path in ("fused", "general"):
        header += [f"{path}, ms", f"estimated: {path}, ms", "estimated / measured"]
    rows = []
    for r in records:
        cells = [r["workload"]]
        for path, measured in r["ms"].items():
            estimated = r["estimated_ms"][path]
            cells += [table.ms(measured), table.ms(estimated), f"{estimated / measured:.2f}"]
        rows.append([*cells, r["taken"], f"{lost(r):.2f}x"])
    return table.markdown([*header, "taken", "lost"], rows)
