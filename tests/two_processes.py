"""What each process of a distributed test runs; a spawned process imports it by this name."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmeta

WORLD, TASKS = 2, 4


def maml() -> fastmeta.MAML:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return fastmeta.MAML(model, inner_lr=0.1, inner_steps=2, learn_inner_lr="layer-step")


def tasks(first: int, last: int) -> tuple[tuple[Tensor, Tensor], ...]:
    random = torch.Generator().manual_seed(1)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, count, 3, dtype=torch.float64, generator=random)
        return x[first:last], torch.randint(2, (TASKS, count), generator=random)[first:last]

    return examples(4), examples(5)


def train(module: nn.Module, first: int, last: int) -> list[Tensor]:
    """The parameters after two SGD steps, and the gradient of the second."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module(*tasks(first, last)).loss.backward()
        optimizer.step()
    return [t.detach().clone() for p in module.parameters() for t in (p, p.grad)]


def process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        module = DistributedDataParallel(maml())
        share = TASKS // WORLD
        torch.save(train(module, rank * share, (rank + 1) * share), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # Torch's DistributedDataParallel keeps gloo's threads past `destroy_process_group`, whatever
    # model it wraps. One that drops its last tensor while the interpreter ends aborts the process
    # (pytorch/pytorch#179291), so a process that has done its work ends without that.
    os._exit(0)
