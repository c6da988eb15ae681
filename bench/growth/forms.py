"""Where the first layer's dual form overtakes the primal one, and which the kernels choose."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from bench import engines, table
from bench import measure as clocks
from bench.engines import Case

HIDDEN, CLASSES = 64, 10
INPUTS = (16, 32, 64, 128, 256, 512, 1024)
SUPPORT = (5, 10, 25, 50)
STEPS = (1, 5)
MANY, FEW, QUERY = 32, 4, 75
"""Tasks, and query examples; the other query sets are as large as the support sets."""


def cases(quick: bool) -> Iterator[Case]:
    grid = itertools.product(((MANY, 0), (MANY, QUERY), (FEW, 0)), STEPS, SUPPORT, INPUTS)
    for (tasks, query), steps, support, inputs in grid:
        if quick and ((tasks, query) != (MANY, 0) or support not in (5, 25) or inputs % 6 != 4):
            continue
        yield Case("", (inputs, HIDDEN, CLASSES), tasks, support, query or support, steps)
    for support, inputs in itertools.product(SUPPORT, INPUTS):  # a set of its own each step
        if not quick:
            yield Case("", (inputs, HIDDEN, CLASSES), MANY, support, support, 5, per_step=True)


def measure(case: Case, seconds: float) -> table.Record:
    """Milliseconds of the compiled step in both forms, each on the engine it is given."""
    calls = {form: engines.call(case, "", form) for form in ("primal", "dual")}
    primal, dual = (call().clone() for call in calls.values())
    if (primal - dual).norm() > 1e-3 * primal.norm():
        raise SystemExit(f"{case}: the forms disagree; not timed")
    # In the thread's own time, so that others on this core do not count.
    milliseconds = clocks.interleaved(calls, seconds, clock=time.thread_time)
    return {
        "inputs": case.widths[0],
        "tasks": case.tasks,
        "support": case.support,
        "query": case.query,
        "steps": case.steps,
        "per_step": case.per_step,
        "ms": milliseconds,
        "estimated_ms": {form: 1e3 * engines.kernel(case, "", form).seconds for form in calls},
        "engines": {form: engines.kernel(case, "", form).engine for form in calls},
        "taken": engines.kernel(case, "", "").form,
    }


def lost(record: table.Record) -> float:
    """The taken form's time over that of the faster one."""
    return record["ms"][record["taken"]] / min(record["ms"].values())


def ratio(record: table.Record) -> float:
    """The primal form's time over the dual form's: above 1 the dual form is faster."""
    return record["ms"]["primal"] / record["ms"]["dual"]


def markdown(records: list[table.Record]) -> str:
    inputs = sorted({r["inputs"] for r in records})
    header = ["T", "Q", "K", "N", *(f"D = {d}" for d in inputs)]
    by_row: dict[tuple[int | str, ...], dict[int, str]] = {}
    for r in records:
        cell = f"**{ratio(r):.2f}**" if r["taken"] == "dual" else f"{ratio(r):.2f}"
        each = " a step" if r.get("per_step") else ""
        row = (r["tasks"], r["query"], r["steps"], f"{r['support']}{each}")
        by_row.setdefault(row, {})[r["inputs"]] = cell
    rows = [
        [*(str(x) for x in row), *(cells.get(d, "–") for d in inputs)]
        for row, cells in by_row.items()
    ]
    wrong = [r for r in records if lost(r) > 1]
    worst = max((lost(r) for r in records), default=1)
    much = sum(lost(r) > 1.1 for r in wrong)
    return (
        f"{table.markdown(header, rows)}\n\nPrimal over dual time of D-{HIDDEN}-{CLASSES}; bold "
        f"where the dual form is taken. The slower form is taken in {len(wrong)} of "
        f"{len(records)} cases, by over 10 % in {much}, by {100 * (worst - 1):.0f} % at most."
    )


def main() -> None:
    torch.set_num_threads(1)
    print(markdown([measure(case, 0.1) for case in cases(quick=False)]))


if __name__ == "__main__":
    main()
