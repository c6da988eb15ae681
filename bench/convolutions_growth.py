"""Growth of the convolutional step with tasks, inner steps, image size and filters.

python -m bench.convolutions_growth --output bench/results/convolutions-growth-DATE.json
python -m bench.convolutions_growth --plot bench/results/convolutions-growth-DATE.json

Four blocks of 3x3 convolution, batch norm, ReLU and pooling, 5-way 1-shot; T = 4, K = 1, 28 x 28
pixels, 64 filters, 15 query examples, one varied at a time. One thread, float32. The arena is what
a thread keeps for its task at hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import cores, loops, rounds, table
from bench.convolutions import operations
from bench.general import step_function
from bench.workloads import Workload, conv4
from fastmeta.arguments import plan_step
from fastmeta.options import Options
from fastmeta.plan import planner

BASE = {"tasks": 4, "steps": 1, "side": 28, "filters": 64}
VARIES = {
    "tasks": (1, 2, 4, 8, 16, 32),
    "steps": (1, 2, 5, 10, 20),
    "side": (16, 28, 42, 56, 84),
    "filters": (16, 32, 48, 64, 96, 128),
}
LABELS = {"tasks": "T", "steps": "K", "side": "side", "filters": "filters"}
HEADER = ["what grows", "fastmeta, ms", "loop, ms", "loop / ours", "GFLOP/s", "arena, MB"]


def workload(tasks: int, steps: int, side: int, filters: int) -> Workload:
    shape = (1, side, side)
    return Workload(
        "conv4", lambda: conv4(1, filters, side, 5), 5, shape, tasks, 5, 15, steps, 0.01
    )


def records(seconds: float) -> Iterator[table.Record]:
    for varies, values in VARIES.items():
        for value in values:
            yield measure(varies, value, seconds)


def measure(varies: str, value: int, seconds: float) -> table.Record:
    chosen = workload(**{**BASE, varies: value})
    model, support, query = chosen.make()
    loss_fn, rate = chosen.loss_fn, chosen.inner_lr
    timings = rounds.times(
        {
            "ours": step_function("fastmeta", chosen, model, support, query),
            "loop": lambda: loops.backward_per_task(
                model, support, query, loss_fn, chosen.steps, rate
            ),
        },
        seconds,
    )
    return {
        "varies": varies,
        "value": value,
        "ms": timings["ours"].ms,
        "loop_ms": timings["loop"].ms,
        "gflops": 1e-6 * operations(chosen) / timings["ours"].ms,
        "megabytes": arena_bytes(chosen) / 1e6,
    }


def arena_bytes(chosen: Workload) -> int:
    model, support, query = chosen.make()
    options = Options(
        inner_lr=chosen.inner_lr, inner_steps=chosen.steps, loss_fn=chosen.loss_fn,
        executor="layered",
    )  # fmt: skip
    with planner.stepping(model) as seen:
        step = plan_step(model, seen, support, query, options, True)
    return step.groups[0][1].selected.offer.workspace_bytes


def markdown(found: list[table.Record]) -> str:
    rows = [
        [
            f"{LABELS[r['varies']]} = {r['value']}", f"{r['ms']:.1f}", f"{r['loop_ms']:.0f}",
            f"{r['loop_ms'] / r['ms']:.1f}", f"{r['gflops']:.0f}", f"{r['megabytes']:.1f}",
        ]
        for r in found
    ]  # fmt: skip
    return table.markdown(HEADER, rows)


def plot(found: list[table.Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(VARIES), figsize=(14, 3.6), layout="constrained")
    for axes, varies in zip(panels, VARIES, strict=True):
        of = [r for r in found if r["varies"] == varies]
        values = [r["value"] for r in of]
        axes.plot(values, [r["ms"] for r in of], "o-", color="#c1272d", label="fastmeta")
        axes.plot(values, [r["loop_ms"] for r in of], "o-", color="#444444", label="plain loop")
        axes.set(xlabel=LABELS[varies], xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms per meta-step")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and row")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="draw figures written before")
    args = parser.parse_args()
    if args.plot:
        found = json.loads(args.plot.read_text())
        plot(found, Path("docs/images/convolutions-growth.png"))
    else:
        cores.restrict(1)
        found = list(records(args.seconds))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"torch {torch.__version__}\n\n{markdown(found)}")


if __name__ == "__main__":
    main()
