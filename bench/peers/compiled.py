"""torch.compile of the torch.func step: `grad_and_value` over `vmap`, and task by task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from bench.peers import functional
from bench.peers.peer import Peer, Step
from bench.workloads import Pair, Workload


def _over_vmap(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    loss = functional.mean_over_tasks(functional.task_loss(workload, model))
    step = torch.compile(grad_and_value(loss), fullgraph=True, dynamic=False)
    theta = functional.parameters(model)
    return Step(lambda: step(theta, *support, *query), functional.read)


def _per_task(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    task = grad_and_value(functional.task_loss(workload, model))
    share = 1 / workload.tasks

    def add(
        total: functional.Parameters, so_far: Tensor, theta: functional.Parameters, *data: Tensor
    ) -> tuple[functional.Parameters, Tensor]:
        gradients, loss = task(theta, *data)
        total = {name: t.add(gradients[name], alpha=share) for name, t in total.items()}
        return total, so_far.add(loss, alpha=share)

    # The sum over tasks is compiled too: it would cost another pass over the gradients.
    step = torch.compile(add, fullgraph=True, dynamic=False)
    theta = functional.parameters(model)
    # Compiled code specialises on alignment: every task's examples stand by themselves.
    tasks = [
        tuple(t[i].clone() for t in (*support, *query)) for i in range(workload.tasks)
    ]  # fmt: skip

    def call() -> tuple[functional.Parameters, Tensor]:
        total = {name: torch.zeros_like(p) for name, p in theta.items()}
        loss = torch.zeros((), dtype=query[0].dtype)
        for data in tasks:
            total, loss = step(total, loss, theta, *data)
        return total, loss

    return Step(call, functional.read)


PEER = Peer("torch.compile", {"grad over vmap": _over_vmap, "per task": _per_task})
