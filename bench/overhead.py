"""The time that Python adds around the compiled step, part by part, for a step seen before.

python -m bench.overhead
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

import fastmeta
from bench.growth import floor
from bench.workloads import WORKLOADS, Workload
from fastmeta import steps
from fastmeta.arguments import plan_step
from fastmeta.executors.fused import step as fused
from fastmeta.options import Options
from fastmeta.plan import planner
from fastmeta.plan.snapshot import snapshot


class _Nothing:
    """A compiled step that computes nothing."""

    def __init__(self, step: Any) -> None:
        self.gradients = step.gradients

    def run(self, *_: Any) -> bool:
        return True


def parts(workload: Workload) -> dict[str, Callable[[], object]]:
    """The parts of a call, to be timed."""
    model, support, query = workload.make()
    options: dict[str, Any] = {
        "inner_lr": workload.inner_lr, "inner_steps": workload.steps, "loss_fn": workload.loss_fn,
        "executor": "fused",
    }  # fmt: skip
    given = Options(**options)

    def look() -> None:
        with planner.stepping(model):
            pass

    def plan() -> Any:
        return plan_step(model, snapshot(model), support, query, given, True)

    def whole() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        fastmeta.maml_step(model, support, query, **options).loss.backward()

    out = fastmeta.maml_step(model, support, query, **options)

    def backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        out.loss.backward(retain_graph=True)

    step = plan()
    planned = step.groups[0][1]
    made = floor.kernel_of(planned)
    empty: Any = replace(made, step=_Nothing(made.step))
    outcome = planner.compute(planned)
    seen = snapshot(model)
    return {
        "look at the model": look,
        "check and plan": lambda: plan_step(model, seen, support, query, given, True),
        "pack and unpack": lambda: fused.run(planned.problem, empty),
        "result and autograd.Function": lambda: steps._meta_step(
            step, [(list(range(workload.tasks)), outcome)]
        ),
        "compiled step, packed": lambda: planner.compute(planned),
        "backward alone": backward,
        "whole call and backward": whole,
    }


def microseconds(function: Callable[[], object], calls: int) -> float:
    """The median."""
    times: list[float] = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


def main() -> None:
    torch.set_num_threads(1)
    for name, calls in (("W1", 2000), ("W1b at T=1", 2000), ("W4", 2000), ("W2", 200)):
        print(f"{name}:")
        for label, function in parts(WORKLOADS[name]).items():
            print(f"  {label:<30} {microseconds(function, calls):7.1f} us")


if __name__ == "__main__":
    main()
