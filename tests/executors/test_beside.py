"""Parameters beside a layer's inputs, as CAVIA's context, in the fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_kernels import ANCHORED, KERNELS, cpu_only
from torch import Tensor, nn
from traced_steps import agree

import fastmeta

pytestmark = cpu_only


class Context(nn.Module):
    """A perceptron that reads its inputs beside a context; subclasses say how."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.randn(self.width).double())
        self.first = nn.Linear(2 + self.width, 7)
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2))
        self.double()

    def beside(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.expand(x.shape[0], -1)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(self.beside(x)))


class Repeated(Context):
    def beside(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.context.repeat(x.size(0), 1)), dim=-1)


class InFront(Context):
    def beside(self, x: Tensor) -> Tensor:
        return torch.cat([self.context.unsqueeze(0).expand(x.size(0), 3), x], 1)


class OfNone(Context):
    def beside(self, x: Tensor) -> Tensor:
        return torch.hstack([x, self.context[None].expand(x.shape[0], 3)])


class ARow(Context):
    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.randn(1, 3).double())


class Two(Context):
    """Two contexts of different kinds."""

    width = 4

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.randn(1).double())
        self.other = nn.Parameter(torch.randn(3).double())

    def beside(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        return torch.cat([self.other.expand(rows, 3), x, self.context.expand(rows, 1)], 1)


class Deep(Context):
    """The context beside the inputs and beside what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(7 + 3, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.beside(x)))
        return self.rest(self.second(self.beside(h)))


KINDS = [Context, Repeated, InFront, OfNone, ARow, Two, Deep]


def sets(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(5, count, 2).double(), torch.randn(5, count, 2).double()


def contexts(name: str, _: Tensor) -> bool:
    return name in ("context", "other")


@pytest.fixture(params=ANCHORED)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_adapt(kind: type[Context], kernel: str) -> None:
    out = agree(kind(), sets(4), sets(6), [], loss_fn=F.mse_loss, adapt=contexts)
    assert out.executor == "fused-cpu"


OPTIONS: dict[str, dict[str, Any]] = {
    "first order": {"first_order": True},
    "no steps": {"inner_steps": 0},
    "evaluated": {"inner_steps": 2, "step_weights": [0.2, 0.3, 0.5], "prox": 0.3},
    "momentum": {"inner_optimizer": fastmeta.inner.SGD(0.9)},
    "adam, clipped": {"inner_optimizer": fastmeta.inner.Adam(eps_root=1e-3, max_grad_norm=0.2)},
    "decay": {"inner_optimizer": fastmeta.inner.SGD(weight_decay=0.1)},
    "frugal": {"memory": "low"},
    "by formula": {"loss_fn": lambda p, y: (p - y).abs().pow(1.5).sum(1).mean()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [Context, InFront])
def test_options(kind: type[Context], options: dict[str, Any]) -> None:
    options = {"loss_fn": F.mse_loss, "adapt": contexts, **options}
    assert agree(kind(), sets(4), sets(6), [], **options).executor == "fused-cpu"


def test_deeper_layers_may_adapt_too() -> None:
    out = agree(
        Context(), sets(4), sets(6), [], loss_fn=F.mse_loss,
        adapt=lambda name, _: name == "context" or name.startswith("rest"),
    )  # fmt: skip
    assert out.executor == "fused-cpu"


def test_learned_rates_of_single_elements() -> None:
    model = Context()
    rate = (0.1 * torch.rand(2, 3)).double().requires_grad_()
    out = agree(
        model, sets(4), sets(6), [rate], loss_fn=F.mse_loss, adapt=contexts,
        inner_lr={"context": rate},
    )  # fmt: skip
    assert out.executor == "fused-cpu"


def test_inputs_that_require_grad() -> None:
    (x, y), query = sets(4), sets(6)
    x.requires_grad_()
    out = agree(Context(), (x, y), query, [x], loss_fn=F.mse_loss, adapt=contexts)
    assert out.executor == "fused-cpu"


def test_frozen_weights_get_no_gradient() -> None:
    model = Context()
    model.first.requires_grad_(False)
    found = []
    for executor in ("fused", "generic"):
        model.zero_grad()
        options: dict[str, Any] = {"loss_fn": F.mse_loss, "adapt": contexts, "executor": executor}
        out = fastmeta.maml_step(model, sets_of(0), sets_of(1), inner_steps=2, **options)
        out.loss.backward()
        assert model.first.weight.grad is None
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def sets_of(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return sets(5)


def test_adapted_models() -> None:
    model, (x, y) = Context(), sets(4)
    found = [
        fastmeta.adapt(
            model, (x, y), inner_steps=3, loss_fn=F.mse_loss, adapt=contexts, executor=name
        )(x)
        for name in ("fused", "generic")
    ]
    torch.testing.assert_close(*found)


def test_tasks_of_different_sizes() -> None:
    model = Context()
    tasks = [
        [(x[0, :n], y[0, :n]) for n in counts for x, y in [sets(6)]] for counts in ((4, 2), (3, 6))
    ]
    found = []
    for executor in ("auto", "generic"):
        out = fastmeta.maml_step(
            model, *tasks, inner_steps=2, loss_fn=F.mse_loss, adapt=contexts, executor=executor
        )
        found.append(torch.autograd.grad(out.loss, list(model.parameters())))
    torch.testing.assert_close(*found)


class Clamped(Context):
    """No mere concatenation, though it looks like one while the context is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(1 + torch.rand(3).double())

    def beside(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.clamp(min=0).expand(x.shape[0], -1)], 1)


class Tied(Context):
    """A weight that is read without a context too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(5, 7, bias=False).double()
        self.again.weight = self.first.weight
        self.widen = nn.Linear(2, 5).double()
        nn.init.constant_(self.widen.bias, -99.0)  # nothing comes through at first

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(self.beside(x)) + self.again(F.relu(self.widen(x))))


@pytest.mark.parametrize("kind", [Clamped, Tied])
def test_what_is_no_such_sum_is_left_to_others(kind: Callable[[], nn.Module]) -> None:
    model = kind()
    out = agree(model, sets(4), sets(6), [], "auto", loss_fn=F.mse_loss, adapt=contexts)
    assert out.executor != "fused-cpu"


def test_a_weight_that_adapts_is_left_to_others() -> None:
    out = agree(Context(), sets(4), sets(6), [], "auto", loss_fn=F.mse_loss)
    assert out.executor != "fused-cpu"
