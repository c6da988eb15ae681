"""fastmeta itself: `maml_step` and `backward`, counted whole, by executor."""

from __future__ import annotations

from torch import Tensor, nn

import fastmeta
from bench import rules
from bench.peers.peer import Form, NotServed, Peer, Step, into_grad
from bench.workloads import Pair, Workload


def optimizer(rule: str) -> fastmeta.inner.InnerOptimizer:
    """The inner optimizer of a workload's rule."""
    if rule == "Adam":
        return fastmeta.inner.Adam(betas=rules.BETAS, eps=rules.EPS)
    return fastmeta.inner.SGD(momentum=rules.MOMENTUM if rule == "momentum" else 0.0)


def _form(executor: str) -> Form:
    def form(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        inner = optimizer(workload.rule)

        def step() -> Tensor:
            out = fastmeta.maml_step(
                model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
                loss_fn=workload.loss_fn, executor=executor, inner_optimizer=inner,
            )  # fmt: skip
            out.loss.backward()
            return out.loss.detach()

        try:
            step()
        except ValueError as reason:
            raise NotServed(str(reason)) from reason
        return into_grad(model, step)

    return form


FUSED = Peer("fastmeta fused", {"maml_step": _form("fused")}, "fastmeta", role="fastmeta")
GENERIC = Peer("fastmeta general", {"maml_step": _form("generic")}, "fastmeta", role="fastmeta")
AUTO = Peer("fastmeta auto", {"maml_step": _form("auto")}, "fastmeta", role="fastmeta")
