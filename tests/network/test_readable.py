"""Harmless things in a model that leave it on the fast path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class WithUnreadHead(Body):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 5).double()


class WithUnusedHead(WithUnreadHead):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        self.auxiliary(hidden)
        return self.second(hidden)


class WithDefaults(Body):
    def forward(self, x: Tensor, return_features: bool = False, *, scale: Any = None) -> Any:
        hidden = F.relu(self.first(x))
        if scale is not None:
            hidden = hidden * scale
        return hidden if return_features else self.second(hidden)


class OverAnOpaqueBase(Body):
    class Base(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.settings["forward"](x)

    def __new__(cls) -> Any:
        class Clean(OverAnOpaqueBase.Base):
            def forward(self, x: Tensor) -> Tensor:
                return self.second(F.relu(self.first(x)))

        return Clean()


def with_silent_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(p=0.0), nn.ReLU(), nn.Linear(8, 2)).double()


MODELS = [WithUnreadHead, WithDefaults, OverAnOpaqueBase, with_silent_dropout]


def _data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, n, 3).double(), torch.randn(3, n, 2).double()) for n in (4, 6)]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("prox", [0.0, 0.5])
def test_is_fused(make: Any, prox: float) -> None:
    model, data = make(), _data()
    rates = {
        name: torch.tensor(0.1, requires_grad=True).double() for name, _ in model.named_parameters()
    }
    found: list[list[Tensor | None]] = []
    for executor in ("auto", "generic"):
        out = fastmeta.maml_step(
            model, *data, inner_lr=rates, inner_steps=2, loss_fn=F.mse_loss, prox=prox,
            executor=executor,
        )  # fmt: skip
        assert out.executor == ("fused-cpu" if executor == "auto" else "generic")
        leaves = [*model.parameters(), *rates.values()]
        found.append([out.loss, *torch.autograd.grad(out.loss, leaves, allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", MODELS)
def test_adapts(make: Any) -> None:
    model, data = make(), _data()
    ours, theirs = (
        fastmeta.adapt(model, data[0], inner_lr=0.1, loss_fn=F.mse_loss, executor=executor)
        for executor in ("auto", "generic")
    )
    assert ours.parameters.keys() == theirs.parameters.keys()
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter, theirs.parameters[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours[1](data[1][0][1]), ours(data[1][0])[1])


def test_a_head_whose_result_is_dropped_is_right() -> None:
    model, data = WithUnusedHead(), _data()
    steps = [
        fastmeta.maml_step(model, *data, loss_fn=F.mse_loss, executor=executor)
        for executor in ("auto", "generic")
    ]
    leaves = list(model.parameters())
    ours, theirs = (torch.autograd.grad(s.loss, leaves, allow_unused=True) for s in steps)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_parameters_that_no_layer_reads_alone_adapt_nothing() -> None:
    model, data = WithUnreadHead(), _data()
    out = fastmeta.maml_step(model, *data, loss_fn=F.mse_loss, adapt="auxiliary")
    unmoved = F.mse_loss(model(data[1][0]), data[1][1])
    torch.testing.assert_close(out.loss, unmoved, rtol=1e-12, atol=0)
