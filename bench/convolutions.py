"""The convolutional step beside the plain loop and one plain supervised step over the same images.

python -m bench.convolutions                              one thread
python -m bench.convolutions --threads 2 --only W5,W6
python -m bench.convolutions --only resnet12,resnet12-84 --unchecked

GFLOP/s count direct convolutions, whatever way they are computed in; the core's own are those of
its best library's large product, timed in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import cores, loops, rounds, table
from bench.general import check, step_function
from bench.growth import floor
from bench.residual import RESIDUAL
from bench.workloads import WORKLOADS, Pair, Workload

NAMES = ("W5", "W5b", "W5s", "W5sq", "W6")
OURS, LOOP, SUPERVISED = "fastmeta", "loop, backward per task", "supervised"
HEADER = [
    "workload", "fastmeta, ms", "loop, ms", "supervised, ms", "loop / ours", "ours / supervised",
    "GFLOP/s", "of a core's",
]  # fmt: skip


def supervised(
    workload: Workload, model: nn.Module, support: Pair, query: Pair
) -> Callable[[], None]:
    """Forward and backward over all images of all tasks as one batch."""
    x, y = (torch.cat(pair, 1).flatten(0, 1) for pair in zip(support, query, strict=True))

    def step() -> None:
        model.zero_grad()
        workload.loss_fn(model(x), y).backward()

    return step


def operations(workload: Workload) -> int:
    """Of the products of a second-order step, two a multiply-add, by direct convolutions.

    The layers' own products take 9 K N + 3 Q passes, those of layers whose input is data 4 K N +
    2 Q: see `bench.operations`.
    """
    model, support, _ = workload.make()
    x = support[0][0]
    inner = workload.steps * workload.support
    inside, outside = 9 * inner + 3 * workload.query, 4 * inner + 2 * workload.query
    counts: list[int] = []

    def count(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        passes = outside if inputs[0] is x else inside
        counts.append(passes * 2 * output[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(x)
    return workload.tasks * sum(counts)


def row(workload: Workload, seconds: float) -> tuple[dict[str, float], float]:
    """Milliseconds of each contender, and the core's GFLOP/s meanwhile."""
    model, support, query = workload.make()
    rate, steps = workload.inner_lr, workload.steps

    def loop() -> Tensor:
        return loops.backward_per_task(model, support, query, workload.loss_fn, steps, rate)

    calls: dict[str, Callable[[], object]] = {
        OURS: step_function("fastmeta", workload, model, support, query),
        LOOP: loop,
        SUPERVISED: supervised(workload, model, support, query),
    }
    side = floor.SIDES[-1]
    products = dict(floor.large_products(side))
    found = {name: t.ms for name, t in rounds.times({**calls, **products}, seconds).items()}
    return found, max(2e-6 * side**3 / found[library] for library in products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="workloads, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="per contender")
    parser.add_argument("--unchecked", action="store_true", help="without float64 autograd first")
    args = parser.parse_args()
    cores.restrict(args.threads)
    rows: list[list[str]] = []
    for name in args.only.split(",") if args.only else NAMES:
        workload = RESIDUAL.get(name) or WORKLOADS[name]
        if not args.unchecked:
            check(workload.with_tasks(2))
        found, core = row(workload, args.seconds)
        ours, loop, plain = (found[contender] for contender in (OURS, LOOP, SUPERVISED))
        gflops = 1e-6 * operations(workload) / ours
        rows.append([
            name, f"{ours:.1f}", f"{loop:.0f}", f"{plain:.0f}", f"{loop / ours:.1f}",
            f"{ours / plain:.2f}", f"{gflops:.0f}", f"{core:.0f}",
        ])  # fmt: skip
    print(table.markdown(HEADER, rows))


if __name__ == "__main__":
    main()
