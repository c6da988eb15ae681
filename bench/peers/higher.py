"""higher 0.2.1: `innerloop_ctx` with its differentiable optimizers, one task at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench import rules
from bench.peers.peer import Peer, TaskLoss, loop_forms
from bench.workloads import Workload


def _task_loss(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    import higher

    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(),
        lr=workload.inner_lr,
        momentum=rules.MOMENTUM if workload.rule == "momentum" else 0.0,
    )
    if workload.rule == "Adam":
        optimizer = torch.optim.Adam(
            model.parameters(), lr=workload.inner_lr, betas=rules.BETAS, eps=rules.EPS
        )

    def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        # Without copies the gradient reaches the model's own parameters.
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (net, inner):
            for _ in range(workload.steps):
                inner.step(workload.loss_fn(net(sx), sy))
            return workload.loss_fn(net(qx), qy)

    return model, loss


PEER = Peer(
    "higher",
    loop_forms(_task_loss),
    module="higher",
    install='pip install -c constraints.txt -e ".[bench]"',
)
