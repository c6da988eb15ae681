"""TorchOpt 0.7.3: its meta-optimizers, state put back after each task; and functional ones.

`MetaSGD` is the form of TorchOpt's own MAML example. The functional form skips its bookkeeping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench import rules
from bench.peers.peer import Peer, TaskLoss, loop_forms
from bench.workloads import Workload


def _meta_optimizer(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    import torchopt

    make = torchopt.MetaAdam if workload.rule == "Adam" else torchopt.MetaSGD
    inner = make(model, **_options(workload))
    # The model's parameters are replaced as it adapts: those that learn are kept here.
    learning = nn.ParameterList(model.parameters())
    start = torchopt.extract_state_dict(model, by="reference")
    fresh = torchopt.extract_state_dict(inner, by="reference")

    def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        for _ in range(workload.steps):
            inner.step(workload.loss_fn(model(sx), sy))
        value = workload.loss_fn(model(qx), qy)
        torchopt.recover_state_dict(model, start)
        torchopt.recover_state_dict(inner, fresh)
        return value

    return learning, loss


def _options(workload: Workload) -> dict[str, Any]:
    rate = {"lr": workload.inner_lr, "moment_requires_grad": False}
    if workload.rule == "Adam":
        return rate | {"betas": rules.BETAS, "eps": rules.EPS}
    return rate | {"momentum": rules.MOMENTUM if workload.rule == "momentum" else 0.0}


def _functional(workload: Workload, model: nn.Module) -> tuple[nn.Module, TaskLoss]:
    import torchopt

    inner = (torchopt.adam if workload.rule == "Adam" else torchopt.sgd)(**_options(workload))
    theta = dict(model.named_parameters())

    def loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        phi = theta
        state = inner.init(tuple(phi.values()))
        for _ in range(workload.steps):
            value = workload.loss_fn(functional_call(model, phi, (sx,)), sy)
            values = tuple(phi.values())
            gradients = torch.autograd.grad(value, values, create_graph=True)
            updates, state = inner.update(gradients, state, inplace=False)
            values = torchopt.apply_updates(values, updates, inplace=False)
            phi = dict(zip(phi, values, strict=True))
        return workload.loss_fn(functional_call(model, phi, (qx,)), qy)

    return model, loss


PEER = Peer(
    "TorchOpt",
    {
        **{f"meta-optimizer, {name}": form for name, form in loop_forms(_meta_optimizer).items()},
        **{f"functional, {name}": form for name, form in loop_forms(_functional).items()},
    },
    module="torchopt",
    install='pip install -c constraints.txt -e ".[bench]"',
)
