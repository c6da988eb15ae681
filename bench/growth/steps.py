"""Steps to time: whole meta-steps, and the compiled step within one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.peers import fastmeta_step, functional, plain
from bench.workloads import WORKLOADS, Workload, mlp
from fastmeta.arguments import plan_step
from fastmeta.options import Options
from fastmeta.plan.planner import Planned
from fastmeta.plan.snapshot import snapshot

NETWORKS = {"1-w-w-1": WORKLOADS["W1b"], "784-w-10": WORKLOADS["W2b"]}
"""The sinusoid's and the digits' workload, whose width `at` sets."""

CONTENDERS = {
    "fused": fastmeta_step.FUSED.forms["maml_step"],
    "general": fastmeta_step.GENERIC.forms["maml_step"],
    "plain loop": plain.PEER.forms["backward per task"],
    "torch.func vmap": functional.PEER.forms["vmap of grad"],
}


def at(
    network: str, tasks: int | None = None, steps: int | None = None, width: int | None = None
) -> Workload:
    """The network's workload, of other sizes where they are given."""
    workload = NETWORKS[network]
    if tasks is not None:
        workload = workload.with_tasks(tasks)
    if steps is not None:
        workload = workload.with_steps(steps)
    if width is not None:
        widths = (1, width, width, 1) if network == "1-w-w-1" else (784, width, 10)
        workload = replace(workload, network=lambda: mlp(*widths))
    return workload


def whole(workload: Workload, contender: str = "fused") -> Callable[[], object]:
    """One meta-step, with its backward: loss, and meta-gradient."""
    return CONTENDERS[contender](workload, *workload.make()).call


def planned(workload: Workload, executor: str = "fused") -> Planned:
    """The step, checked and planned: what `planner.compute` runs."""
    model, support, query = workload.make()
    options = Options(
        inner_lr=workload.inner_lr, inner_steps=workload.steps, loss_fn=workload.loss_fn,
        executor=executor,
    )  # fmt: skip
    return plan_step(model, snapshot(model), support, query, options, True).groups[0][1]
