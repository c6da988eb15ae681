"""The plain autograd loop of `bench/loops.py`: what a careful person writes without a library.

Parameters as they are, or all in one flat vector, whose rule then takes few operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench import loops, rules
from bench.peers.peer import Form, Peer, Step, TaskLoss, into_grad, loop_forms
from bench.workloads import Pair, Workload


def _form(loop: Callable[..., Tensor]) -> Form:
    def step(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        about = workload.loss_fn, workload.steps, workload.inner_lr, workload.rule
        return into_grad(model, lambda: loop(model, support, query, *about))

    return step


def _flat(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    update = rules.update(workload.rule, workload.inner_lr)
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(named.items(), phi.split(sizes), strict=True)
        given = {name: part.view(p.shape) for (name, p), part in parts}
        return workload.loss_fn(functional_call(model, given, (x,)), y)

    def adapted_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        phi, state = torch.cat([p.flatten() for p in named.values()]), ()
        for step in range(workload.steps):
            gradients = torch.autograd.grad(loss(phi, sx, sy), [phi], create_graph=True)
            (phi,), state = update([phi], gradients, state, step)
        return loss(phi, qx, qy)

    return model, adapted_loss


PEER = Peer(
    "plain loop",
    {
        "backward at end": _form(loops.backward_at_end),
        "backward per task": _form(loops.backward_per_task),
        **{f"flat, {name}": form for name, form in loop_forms(_flat).items()},
    },
)
