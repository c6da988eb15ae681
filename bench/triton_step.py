"""What Triton's fused step has to do for one task, counted from its table; no GPU is needed.

Multiply-adds and bytes are those of one task: what its products need, what their tiles make of it,
and what its operations read and write, most of it in the second-level cache.

python -m bench.triton_step
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

from torch import nn

from bench import operations, table
from bench.workloads import WORKLOADS, Workload
from fastmeta.executors.fused.operations import sweep
from fastmeta.executors.fused.operations.layout import Layout, Sizes
from fastmeta.executors.fused.lowering import Dense, Recipe
from fastmeta.executors.kernel_loss import KernelLoss

HEADER = (
    "network", "widths", "T", "operations", "multiply-adds needed, M", "in tiles, M", "MB moved",
    "us at 128 a clock", "us at 64 bytes a clock", "buffer of all tasks, MB",
)  # fmt: skip
NAMES = ("W1b", "W1c", "W2b", "W3", "W4")
RELU, CROSS_ENTROPY, MSE = 1, 0, 1
CLOCK = 1.98e9
MULTIPLY_ADDS, BYTES = 128, 64
"""A clock and multiprocessor: of float32, and from the second-level cache (H100 and H200)."""

kernels: Any = importlib.import_module("fastmeta.kernels.launch")
record: Any = importlib.import_module("fastmeta.kernels.record")


def widths(workload: Workload) -> list[int]:
    linear = [module for module in workload.network() if isinstance(module, nn.Linear)]
    return [linear[0].in_features, *(layer.out_features for layer in linear)]


def layout(workload: Workload) -> Layout:
    pairs = [*itertools.pairwise(widths(workload))]
    layers = tuple(
        Dense(f"{i}.weight", f"{i}.bias", d, h, activation=RELU if i < len(pairs) - 1 else None)
        for i, (d, h) in enumerate(pairs)
    )
    names = tuple(name for layer in layers for name in layer.tensors() if name)
    loss = MSE if workload.classes is None else CROSS_ENTROPY
    steps = workload.steps
    sizes = Sizes(
        workload.tasks, workload.support, workload.query, steps, names,
        tuple(k == steps for k in range(steps + 1)), True, False, False, False, False, 0.0,
    )  # fmt: skip
    return Layout(Recipe(layers, KernelLoss(loss, 0.0, -100)), sizes)


def counted(rows: list[list[int]]) -> tuple[int, int]:
    """Multiply-adds in whole tiles, and numbers read and written."""
    tile = [kernels.STEP[name] for name in ("BM", "BN", "BK")]
    in_tiles = numbers = 0
    for row in rows:
        m, n = row[record.ROWS.value], row[record.COLS.value]
        down, across = -(-m // tile[0]), -(-n // tile[1])
        for field in (record.DEPTH, record.DEPTH2):
            depth = row[field.value]
            in_tiles += down * across * tile[0] * tile[1] * -(-depth // tile[2]) * tile[2]
            numbers += depth * (m * across + n * down)
        numbers += 3 * m * n  # what an ending reads and writes, roughly
    return in_tiles, numbers


def main() -> None:
    lines: list[list[str]] = []
    for name in NAMES:
        workload = WORKLOADS[name]
        place = layout(workload)
        rows = sweep.table(place).tensors()[0].tolist()
        needed = operations.of_step(
            widths(workload), 1, workload.support, workload.query, workload.steps
        )
        in_tiles, numbers = counted(rows)
        lines.append([
            name, "-".join(map(str, widths(workload))), str(workload.tasks), str(len(rows)),
            f"{needed / 2e6:.2f}", f"{in_tiles / 1e6:.2f}", f"{4 * numbers / 1e6:.2f}",
            f"{in_tiles / MULTIPLY_ADDS / CLOCK * 1e6:.0f}",
            f"{4 * numbers / BYTES / CLOCK * 1e6:.0f}", f"{4 * place.space.size / 1e6:.1f}",
        ])  # fmt: skip
    print(table.markdown(HEADER, lines))


if __name__ == "__main__":
    main()
