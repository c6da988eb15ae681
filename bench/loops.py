"""The rival: MAML by plain autograd, written as tightly as PyTorch lets one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench import rules

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def backward_at_end(
    model: nn.Module,
    support: Pair,
    query: Pair,
    loss_fn: Loss,
    steps: int,
    inner_lr: float,
    rule: str = "descent",
) -> Tensor:
    """All tasks' graphs, then one backward."""
    update = rules.update(rule, inner_lr)
    losses = [
        _task(model, support, query, i, loss_fn, steps, update) for i in range(len(support[0]))
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.detach()


def backward_per_task(
    model: nn.Module,
    support: Pair,
    query: Pair,
    loss_fn: Loss,
    steps: int,
    inner_lr: float,
    rule: str = "descent",
) -> Tensor:
    """A backward after every task, which frees its graph: the rival to beat on memory."""
    update = rules.update(rule, inner_lr)
    tasks = len(support[0])
    total = support[0].new_zeros(())
    for i in range(tasks):
        loss = _task(model, support, query, i, loss_fn, steps, update) / tasks
        loss.backward()
        total += loss.detach()
    return total


def _task(
    model: nn.Module,
    support: Pair,
    query: Pair,
    task: int,
    loss_fn: Loss,
    steps: int,
    update: rules.Update,
) -> Tensor:
    phi: dict[str, Tensor] = dict(model.named_parameters())
    state: rules.State = ()
    x, y = support[0][task], support[1][task]
    for step in range(steps):
        loss = loss_fn(functional_call(model, phi, (x,)), y)
        gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        values, state = update(list(phi.values()), gradients, state, step)
        phi = dict(zip(phi, values, strict=True))
    return loss_fn(functional_call(model, phi, (query[0][task],)), query[1][task])
