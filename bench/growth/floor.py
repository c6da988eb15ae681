"""The fused step beside its floor: the products' arithmetic at this core's own speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from bench import fused, operations, rounds, table
from bench.growth import steps
from bench.workloads import WORKLOADS, Workload
from fastmeta.executors.fused.kernel import Kernel, kernel
from fastmeta.executors.fused.lowering import lower
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned

SIDES = (384, 512, 768)
"""Sides of the square products that give the core's speed: in its caches, and long enough."""
SHARE = 0.7
"""Share of a large product's speed that a kernel of many small ones can be asked to reach."""
PERCENT = f"{100 * SHARE:.0f} %"


def measure(name: str, seconds: float) -> table.Record:
    """Milliseconds of the step, and of the library's products in the same rounds."""
    workload = WORKLOADS[name]
    # The loop of the check is long; a few tasks fill the same lanes.
    fused.check(workload if workload.tasks <= 100 else workload.with_tasks(50))
    planned = steps.planned(workload)
    made = kernel_of(planned)
    products = {(library, side): call for side in SIDES for library, call in large_products(side)}
    timings = rounds.times(
        {
            "whole": steps.whole(workload),
            "kernel": lambda: planner.compute(planned),
            **{f"{library} {side}": call for (library, side), call in products.items()},
        },
        seconds,
    )
    gflops: dict[str, float] = {}
    for library, side in products:
        found = 2e-6 * side**3 / timings[f"{library} {side}"].ms
        gflops[library] = max(found, gflops.get(library, 0))
    return {
        "workload": name,
        "form": made.step.form,
        "engine": made.step.engine,
        "operations": operations_of(workload, made),
        "gflops": gflops,
        "whole_ms": timings["whole"].ms,
        "kernel_ms": timings["kernel"].ms,
    }


def operations_of(workload: Workload, made: Kernel) -> int:
    layers = made.lowered.layers
    return operations.of_step(
        [layers[0].inputs, *(layer.outputs for layer in layers)],
        workload.tasks, workload.support, workload.query, workload.steps,
        dual=made.step.form == "dual",
    )  # fmt: skip


def kernel_of(planned: Planned) -> Kernel:
    """The fused kernel of a step; **raises** `NotSupported` where it has none."""
    problem = planned.problem
    return kernel(problem, lower(planned.selected.reading, problem), problem.low_memory)


def floor_ms(record: table.Record, gflops: float) -> float:
    """Milliseconds of the arithmetic at the speed of a large product."""
    return 1e-6 * record["operations"] / gflops


def speeds(records: Iterable[table.Record]) -> dict[str, float]:
    """GFLOP/s of each library's product: the best that any workload's rounds have seen."""
    found: dict[str, float] = {}
    for r in records:
        for library, gflops in r["gflops"].items():
            found[library] = max(gflops, found.get(library, 0))
    return found


def speed(records: Iterable[table.Record]) -> float:
    """The core's: that of the fastest library."""
    return max(speeds(records).values())


def markdown(records: list[table.Record]) -> str:
    gflops = speed(records)
    header = [
        "workload", "form, lanes over", "operations, M", "floor at 100 %, ms",
        f"floor at {PERCENT}, ms", "kernel, ms", "whole, ms", f"{PERCENT} floor / kernel",
        f"{PERCENT} floor / whole", "100 % floor / kernel", "100 % floor / whole",
    ]  # fmt: skip
    rows = []
    for r in records:
        floor = floor_ms(r, gflops)
        shares = [floor / SHARE / r["kernel_ms"], floor / SHARE / r["whole_ms"]]
        shares += [floor / r["kernel_ms"], floor / r["whole_ms"]]
        rows.append([
            r["workload"], f"{r['form']}, {r['engine']}", f"{r['operations'] / 1e6:.2f}",
            *(table.ms(x) for x in (floor, floor / SHARE, r["kernel_ms"], r["whole_ms"])),
            *(f"{share:.2f}" for share in shares),
        ])  # fmt: skip
    found = ", ".join(f"{library} {x:.0f}" for library, x in speeds(records).items())
    return f"{table.markdown(header, rows)}\n\nA large product, GFLOP/s: {found}."


def large_products(side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """One product by each library in torch: on some processors one runs at half speed."""
    a, b, out = (torch.randn(side, side) for _ in range(3))
    yield "torch.mm", lambda: torch.mm(a, b, out=out)
    if torch.backends.mkldnn.is_available():
        x, weight = a.to_mkldnn(), b.to_mkldnn()
        yield "oneDNN linear", lambda: F.linear(x, weight)
