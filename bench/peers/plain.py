"""The plain autograd loop of `bench/loops.py`: what a careful person writes without a library."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bench import loops
from bench.peers.peer import Form, Peer, Step, into_grad
from bench.workloads import Pair, Workload


def _form(loop: Callable[..., Tensor]) -> Form:
    def step(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        return into_grad(
            model,
            lambda: loop(
                model, support, query, workload.loss_fn, workload.steps, workload.inner_lr
            ),
        )

    return step


PEER = Peer(
    "plain loop",
    {
        "backward at end": _form(loops.backward_at_end),
        "backward per task": _form(loops.backward_per_task),
    },
)
