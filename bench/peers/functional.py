"""torch.func: `vmap` over tasks of `grad` through an inner loop of `grad`, and the other order.

Through affine batch norm the other order is silently wrong in torch 2.13: the check refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from bench import rules
from bench.peers.peer import Peer, Result, Step
from bench.workloads import Pair, Workload

Parameters = dict[str, Tensor]
TaskLoss = Callable[[Parameters, Tensor, Tensor, Tensor, Tensor], Tensor]


def task_loss(workload: Workload, model: nn.Module) -> TaskLoss:
    """A task's query loss after the inner loop, as a function of the parameters."""
    loss_fn, update = workload.loss_fn, rules.update(workload.rule, workload.inner_lr)

    def loss(phi: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, phi, (x,)), y)

    def adapted_loss(theta: Parameters, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        phi, state = theta, ()
        for step in range(workload.steps):
            gradients = grad(loss)(phi, sx, sy)
            values = [gradients[name] for name in phi]
            values, state = update(list(phi.values()), values, state, step)
            phi = dict(zip(phi, values, strict=True))
        return loss(phi, qx, qy)

    return adapted_loss


def mean_over_tasks(loss: TaskLoss) -> TaskLoss:
    """The mean of all tasks' losses, the tasks under `vmap`."""
    return lambda theta, *data: vmap(loss, (None, 0, 0, 0, 0))(theta, *data).mean()


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def read(result: Any) -> Result:
    """From what `grad_and_value` gives."""
    gradients, loss = result
    return float(loss), [g.detach().clone() for g in gradients.values()]


def _vmap_of_grad(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    step = vmap(grad_and_value(task_loss(workload, model)), (None, 0, 0, 0, 0))
    theta = parameters(model)

    def call() -> tuple[Parameters, Tensor]:
        gradients, losses = step(theta, *support, *query)
        return {name: g.mean(0) for name, g in gradients.items()}, losses.mean()

    return Step(call, read)


def _grad_of_vmap(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    step = grad_and_value(mean_over_tasks(task_loss(workload, model)))
    theta = parameters(model)
    return Step(lambda: step(theta, *support, *query), read)


PEER = Peer("torch.func", {"vmap of grad": _vmap_of_grad, "grad of vmap": _grad_of_vmap})
