"""Loop, vmap or the layers' rules: measured on a grid of problems, beside what is picked.

Picked by the cost model's estimates alone, and as `auto` does it, by timing some tasks once.

python -m bench.crossover
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from unittest import mock

import torch
from torch import nn

from bench import measure
from bench.executors import leaving
from bench.workloads import WORKLOADS, StridedConv4, Workload, conv4, mlp
from fastmeta.arguments import plan_step
from fastmeta.executors.base import Offer
from fastmeta.executors.every import EXECUTORS
from fastmeta.executors.generic import cost
from fastmeta.options import Options
from fastmeta.plan import timing
from fastmeta.plan.planner import Planned
from fastmeta.plan.snapshot import snapshot

RULES = "layered-torch"
WAYS = ("loop", "vmap", RULES)


def grid() -> list[Workload]:
    """From tiny to wide, few tasks to many; and convolutions."""
    base = WORKLOADS["W2"]
    rows: list[Workload] = []
    for width, tasks, steps in [
        (16, 2, 1), (16, 4, 5), (16, 32, 1), (64, 2, 1), (64, 4, 5), (64, 32, 1), (64, 32, 5),
        (256, 4, 1), (256, 32, 1), (512, 4, 5), (512, 16, 1),
    ]:  # fmt: skip
        for inputs in (32, 784):
            name = f"mlp {inputs}-{width}-{width}-10, T={tasks}, K={steps}"
            network = lambda inputs=inputs, width=width: mlp(inputs, width, width, 10)  # noqa: E731
            rows.append(
                replace(base, name=name, network=network, shape=(inputs,), tasks=tasks, steps=steps,
                        query=50)
            )  # fmt: skip
    image = WORKLOADS["W5"]
    rows += [
        replace(image, name="conv4 8 filters, T=8", network=lambda: conv4(1, 8, 28, 5), tasks=8),
        replace(image, name="conv4 32 filters, T=4", network=lambda: conv4(1, 32, 28, 5)),
        replace(image, name="strided conv4, 16 filters, T=32", tasks=32, query=5,
                network=lambda: StridedConv4(5, 16)),
    ]  # fmt: skip
    rows += [
        replace(image, name=f"conv4 {filters} filters, {norm}, T={tasks}, K={steps}",
                network=lambda filters=filters, norm=norm: _normalised(filters, norm),
                tasks=tasks, steps=steps, query=15)
        for norm, filters, tasks, steps in [
            ("group norm", 8, 4, 5), ("group norm", 8, 32, 1), ("group norm", 32, 4, 1),
            ("group norm", 32, 4, 5), ("group norm", 32, 32, 1), ("group norm", 64, 4, 1),
            ("no norm, ELU", 32, 4, 1), ("no norm, ELU", 32, 32, 1),
        ]
    ]  # fmt: skip
    return [WORKLOADS[name] for name in ("W1", "W1b", "W2", "W2b", "W3", "W4", "W5s")] + rows


def _normalised(filters: int, norm: str) -> nn.Sequential:
    """`conv4` with group norm in place of its batch norm, or with none and a smooth activation."""
    layers: list[nn.Module] = []
    for layer in conv4(1, filters, 28, 5):
        if isinstance(layer, nn.BatchNorm2d):
            layers += [nn.GroupNorm(8, filters)] if norm == "group norm" else []
        else:
            layers.append(nn.ELU() if isinstance(layer, nn.ReLU) and "ELU" in norm else layer)
    return nn.Sequential(*layers)


def _planned(workload: Workload, timed: bool) -> tuple[Planned, float]:
    """The plan of a network's step, by the clock or by the estimates, and its seconds."""
    model, support, query = workload.make()
    options = Options(
        inner_lr=workload.inner_lr, inner_steps=workload.steps, loss_fn=workload.loss_fn
    )
    start = time.perf_counter()
    # What the kernels serve is not the question here.
    with mock.patch.object(timing, "may_time", return_value=timed), leaving(WAYS.__contains__):
        step = plan_step(model, snapshot(model), support, query, options, True)
    return step.groups[0][1], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--every", type=int, default=1, help="take one problem in so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| problem | loop, ms | vmap, ms | rules, ms | estimated: loop | vmap | by estimate | lost "
        "| by the clock | lost | more to plan, ms |"
    )
    print("|---" * 11 + "|")
    for workload in grid()[:: args.every]:
        estimated, plain = _planned(workload, timed=False)
        timed, longer = _planned(workload, timed=True)
        reading, problem = estimated.selected.reading, estimated.problem
        offers = {e.name: e.offer(reading, problem) for e in EXECUTORS if e.name in WAYS}
        ways = {
            name: functools.partial(offer.run, problem)
            for name, offer in offers.items()
            if isinstance(offer, Offer)
        }
        times = measure.interleaved(ways, args.seconds, least=3, clock=time.process_time)
        picks = [
            f"{name} | {times[name] / min(times.values()):.2f}x"
            for name in (p.selected.executor.name for p in (estimated, timed))
        ]
        loop, vmap = (f(reading.profile, problem) for f in (cost.loop, cost.vmap))
        rules = f"{times[RULES]:.2f}" if RULES in times else ""
        print(
            f"| {workload.name} | {times['loop']:.2f} | {times['vmap']:.2f} | {rules} "
            f"| {1e3 * loop:.2f} | {1e3 * vmap:.2f} | {picks[0]} | {picks[1]} "
            f"| {1e3 * (longer - plain):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
