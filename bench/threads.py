"""Whole meta-steps on one and on two threads: a second one must never make a small step slower.

python -m bench.threads
python -m bench.threads --only W1,W4 --seconds 10
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import nn

import fastmeta
from bench.workloads import WORKLOADS, Pair, Workload

NAMES = ("W1", "W1b", "W1b at T=1", "W2", "W2b", "W3", "W4", "W5s")
THREADS = (1, 2)
TURN = 0.02
"""Seconds of calls before the other number of threads has its turn: changing it takes time."""


def step(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> None:
    """One whole meta-step."""
    out = fastmeta.maml_step(
        model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
        loss_fn=workload.loss_fn,
    )  # fmt: skip
    out.loss.backward()


def turn(threads: int, calls: int, workload: Workload, data: tuple[nn.Module, Pair, Pair]) -> float:
    """Milliseconds a step on so many threads."""
    torch.set_num_threads(threads)
    step(workload, *data)
    start = time.perf_counter()
    for _ in range(calls):
        step(workload, *data)
    return 1e3 * (time.perf_counter() - start) / calls


def measure(workload: Workload, seconds: float) -> list[float]:
    """Median milliseconds a step on each number of threads, in turns."""
    data = workload.make()
    turn(1, 1, workload, data)
    calls = max(1, round(1e3 * TURN / turn(1, 1, workload, data)))
    samples: list[list[float]] = [[] for _ in THREADS]
    start = time.perf_counter()
    while len(samples[0]) < 5 or time.perf_counter() - start < seconds:
        for threads, times in zip(THREADS, samples, strict=True):
            times.append(turn(threads, calls, workload, data))
    return [median(times) for times in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(NAMES), help="workloads, with commas between")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each workload")
    arguments = parser.parse_args()
    print("| workload | one thread, ms | two threads, ms | two / one |\n| --- | --- | --- | --- |")
    for name in arguments.only.split(","):
        one, two = measure(WORKLOADS[name], arguments.seconds)
        print(f"| {name} | {one:.3f} | {two:.3f} | {two / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
