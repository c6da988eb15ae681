"""Long sets in the fused CPU step: the time by the number of examples, on one and two threads.

The neural field W7 (`bench/workloads.py`), one task or four; loss and backward. Thread counts take
turns call by call; medians.

python -m bench.long_sets [--seconds 10]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

import fastmeta
from bench.workloads import WORKLOADS, Workload

CASES = [(1, 1024), (1, 4096), (1, 16384), (4, 1024), (4, 4096)]
"""T, and N = Q."""


def call(workload: Workload) -> tuple[Callable[[], None], str]:
    """A step with its backward pass, and what `explain` says of its kernel."""
    model, support, query = workload.make()
    options: dict[str, Any] = {"inner_lr": workload.inner_lr, "inner_steps": workload.steps}
    options["loss_fn"] = workload.loss_fn

    def step() -> None:
        out = fastmeta.maml_step(model, support, query, **options)
        out.loss.backward()

    told = fastmeta.explain(model, support, query, **options)
    kernel = next(line for line in told.splitlines() if "kernel:" in line)
    return step, kernel.split("inner loop ")[1]


def times(step: Callable[[], None], threads: tuple[int, ...], seconds: float) -> list[float]:
    """The median seconds of a step, by the number of threads."""
    taken: dict[int, list[float]] = {count: [] for count in threads}
    before = torch.get_num_threads()
    step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not taken[threads[-1]]:
        for count in threads:
            torch.set_num_threads(count)
            start = time.perf_counter()
            step()
            taken[count].append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return [median(taken[count]) for count in threads]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    seconds = parser.parse_args().seconds
    print("| T | N = Q | inner loop | one thread, ms | two threads, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for tasks, examples in CASES:
        workload = replace(WORKLOADS["W7"], tasks=tasks, support=examples, query=examples)
        step, kernel = call(workload)
        one, two = times(step, (1, 2), seconds)
        print(
            f"| {tasks} | {examples} | {kernel} | {one * 1e3:.1f} | {two * 1e3:.1f} "
            f"| {one / two:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
