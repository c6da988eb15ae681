"""A yardstick: one plain supervised PyTorch step over the same examples, with no inner loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.peers.peer import Peer, Step, into_grad
from bench.workloads import Pair, Workload


def _step(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    x, y = (torch.cat((s, q), 1).flatten(0, 1) for s, q in zip(support, query, strict=True))

    def step() -> Tensor:
        loss = workload.loss_fn(model(x), y)
        loss.backward()
        return loss.detach()

    return into_grad(model, step)


PEER = Peer("supervised step", {"all tasks": _step}, role="yardstick", second_order=False)
