"""The time of a step beside that of another commit, in turns.

git worktree add /tmp/before HEAD~1 && (cd /tmp/before && python setup.py build_ext --inplace)
python -m bench.against /tmp/before                    W1 to W6, one thread
python -m bench.against /tmp/before --only W1 W4

Each tree steps the same workloads in processes of its own, one after the other, several times over:
a slow spell of a shared machine hits both. Loss and backward, no optimizer; medians over the rounds
of each process's median, and the ratio of the two trees round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastmeta
from bench import measure
from bench.peers import fastmeta_step
from bench.workloads import WORKLOADS, Workload

NAMES = ["W1", "W1b", "W2", "W2b", "W3", "W4", "W5", "W5b", "W5s", "W5sq", "W6"]
HERE = Path(__file__).parents[1]


def step(workload: Workload, made: Any) -> None:
    """One step with its backward pass."""
    model, support, query = made
    options: dict[str, Any] = {}
    if workload.rule != "descent":  # earlier commits have no other
        options["inner_optimizer"] = fastmeta_step.optimizer(workload.rule)
    out = fastmeta.maml_step(
        model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
        loss_fn=workload.loss_fn, **options,
    )  # fmt: skip
    out.loss.backward()


def times_here(names: list[str], seconds: float) -> dict[str, float]:
    """Median milliseconds of a step of each workload, by the package that is imported."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    for name in names:
        call = partial(step, WORKLOADS[name], WORKLOADS[name].make())
        call()
        found |= measure.interleaved({name: call}, seconds)
    return found


def times_of(tree: Path, names: list[str], seconds: float) -> dict[str, float]:
    """The same by the package in another tree, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", __file__, str(tree), "--here", "--seconds", str(seconds)]
    done = subprocess.run(
        [*command, "--only", *names], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a built checkout of the other commit")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="a workload, process and round")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    other = options.other.resolve()
    if options.here:
        if not Path(fastmeta.__file__).is_relative_to(other):
            raise SystemExit(f"{fastmeta.__file__} was imported, not that of {other}")
        print(json.dumps(times_here(options.only, options.seconds)))
        return
    found: list[list[dict[str, float]]] = []
    for turn in range(options.rounds):
        trees = [HERE, other] if turn % 2 == 0 else [other, HERE]
        times = {tree: times_of(tree, options.only, options.seconds) for tree in trees}
        found.append([times[HERE], times[other]])
    print("| workload | this tree, ms | the other, ms | this / other, median (least to most) |")
    print("|---|---|---|---|")
    for name in options.only:
        ours, theirs = ([times[i][name] for times in found] for i in (0, 1))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(
            f"| {name} | {median(ours):.3g} | {median(theirs):.3g} | {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
