"""How near the fused step comes to its floor: the products' arithmetic at this core's own speed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench import fused, operations, rounds, table
from bench.growth import steps
from bench.workloads import WORKLOADS, Workload
from fastmeta.executors.fused import Kernel
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned

SIDES = (384, 512, 768, 1024)
"""Of the square products that the core's speed is taken from: in its caches, and long enough."""
SHARE = 0.7
"""What a kernel of many small products can be asked to reach of a large one's speed."""


def measure(name: str, seconds: float) -> table.Record:
    """Milliseconds of the step, and of the library's products in the same rounds."""
    workload = WORKLOADS[name]
    # The loop of the check is long; a few tasks fill the same lanes.
    fused.check(workload if workload.tasks <= 100 else workload.with_tasks(50))
    planned = steps.planned(workload)
    kernel = kernel_of(planned)
    products = {side: _product(side) for side in SIDES}
    timings = rounds.times(
        {
            "whole": steps.whole(workload),
            "kernel": lambda: planner.compute(planned),
            **{f"product {side}": call for side, call in products.items()},
        },
        seconds,
    )
    gflops = max(2e-6 * side**3 / timings[f"product {side}"].ms for side in SIDES)
    return {
        "workload": name,
        "form": kernel.step.form,
        "engine": kernel.step.engine,
        "operations": operations_of(workload, kernel),
        "gflops": gflops,
        "whole_ms": timings["whole"].ms,
        "kernel_ms": timings["kernel"].ms,
    }


def operations_of(workload: Workload, kernel: Kernel) -> int:
    layers = kernel.recipe.layers
    return operations.of_step(
        [layers[0].inputs, *(layer.outputs for layer in layers)],
        workload.tasks, workload.support, workload.query, workload.steps,
        dual=kernel.step.form == "dual",
    )  # fmt: skip


def kernel_of(planned: Planned) -> Kernel:
    if planned.kernel is None:
        raise ValueError("executor: this step has no fused kernel; plan it with 'fused'")
    return planned.kernel


def floor_ms(record: table.Record, gflops: float) -> float:
    """Milliseconds of the arithmetic at the speed of a large product."""
    return 1e-6 * record["operations"] / gflops


def speed(records: Iterable[table.Record]) -> float:
    """The core's, GFLOP/s: the best that any workload's rounds have seen."""
    return max(r["gflops"] for r in records)


def markdown(records: list[table.Record]) -> str:
    gflops = speed(records)
    header = [
        "workload", "form, lanes over", "operations, M", "floor at 100 %, ms",
        f"floor at {SHARE:.0%}, ms", "kernel, ms", "whole, ms", f"{SHARE:.0%} floor / kernel",
        f"{SHARE:.0%} floor / whole", "100 % floor / kernel", "100 % floor / whole",
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
    return f"{table.markdown(header, rows)}\n\nA large product runs at {gflops:.0f} GFLOP/s."


def _product(side: int):
    a, b, out = (torch.randn(side, side) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)
