"""The reference: loss and meta-gradient by autograd, one task at a time, obviously right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastmeta.inner import InnerOptimizer
from fastmeta.inner.one_task import one_task


@dataclass
class Reference:
    """What the oracle gives; `gradients` follow the leaves that were asked for."""

    loss: Tensor
    task_losses: Tensor
    support_losses: list[list[Tensor]]
    query_outputs: list[Any]
    gradients: list[Tensor | None]


def maml(
    model: nn.Module,
    tasks: list[tuple[Any, Any, Any, Any]],
    leaves: list[Tensor],
    *,
    rate: Callable[[str, int], Any] = lambda name, step: 0.01,
    steps: int = 1,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    adapted: list[str] | None = None,
    first_order: bool = False,
    step_weights: Any = None,
    task_weights: Any = None,
    prox: float = 0.0,
    rule: InnerOptimizer | None = None,
    query_loss_fn: Callable[[Any, Any], Tensor] | None = None,
    per_step: bool = False,
) -> Reference:
    """`tasks` holds `(support_x, support_y, query_x, query_y)` without a task axis.

    `rule`: the update rule, by its own `update`, which tests/inner holds against torch.optim; None
    is written out here. `per_step`: whether support leaves are `[K, N, ...]`.
    """
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = list(theta) if adapted is None else adapted
    weights = [0.0] * steps + [1.0] if step_weights is None else step_weights
    task_losses, support_losses, outputs = [], [], []
    for support_x, support_y, query_x, query_y in tasks:
        phi = {name: p.clone() for name, p in theta.items()}  # "clone the model"
        losses, total = [], torch.zeros((), dtype=torch.float64)
        output = None
        update = None if rule is None else one_task(rule)
        state = update and update.init({name: phi[name] for name in adapted})
        for step in range(steps + 1):
            output = call(model, phi, query_x)
            total = total + weights[step] * (query_loss_fn or loss_fn)(output, query_y)
            if step == steps:
                break
            at = (lambda leaf, k=step: leaf[k]) if per_step else (lambda leaf: leaf)
            x, y = pytree.tree_map(at, (support_x, support_y))
            loss = loss_fn(call(model, phi, x), y)
            losses.append(loss.detach())
            for name in adapted:
                loss = loss + prox / 2 * (phi[name] - theta[name]).square().sum()
            inner = [phi[name] for name in adapted]
            gradients = torch.autograd.grad(
                loss, inner, create_graph=not first_order, retain_graph=True, allow_unused=True
            )
            phi = dict(phi)
            if update is not None:
                found = zip(adapted, gradients, inner, strict=True)
                g = {n: torch.zeros_like(p) if g is None else g for n, g, p in found}
                here = dict(zip(adapted, inner, strict=True))
                moved, state = update.update(g, state, here, {n: rate(n, step) for n in g}, step)
                phi.update(moved)
                continue
            for name, gradient in zip(adapted, gradients, strict=True):
                if gradient is not None:
                    phi[name] = phi[name] - rate(name, step) * gradient
        task_losses.append(total)
        support_losses.append(losses)
        outputs.append(output)
    losses = torch.stack(task_losses)
    loss = losses.mean() if task_weights is None else (losses * task_weights).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return Reference(loss.detach(), losses.detach(), support_losses, outputs, list(gradients))


def call(model: nn.Module, parameters: dict[str, Tensor], x: Any) -> Any:
    """The module as a function; buffers that it writes are copies."""
    replaced = {**{name: b.clone() for name, b in model.named_buffers()}, **parameters}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
        if isinstance(x, dict):
            return functional_call(model, replaced, (), x)
        return functional_call(model, replaced, x if isinstance(x, tuple) else (x,))


def split(support: Any, query: Any) -> list[tuple[Any, Any, Any, Any]]:
    """Batched `(x, y)` pairs as one tuple a task."""
    count = _leaves(support[0])[0].shape[0]
    return [
        (_at(support[0], i), _at(support[1], i), _at(query[0], i), _at(query[1], i))
        for i in range(count)
    ]


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    return [leaf for value in values for leaf in _leaves(value)]


def _at(tree: Any, index: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[index]
    if isinstance(tree, dict):
        return {key: _at(value, index) for key, value in tree.items()}
    return tuple(_at(value, index) for value in tree)
