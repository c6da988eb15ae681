"""Inputs that require grad, and what torch runs in front of the fused step's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta
from fastmeta.inner import SGD

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import cpu_only

pytestmark = cpu_only

Batch = tuple[Tensor, Tensor]


class Words(nn.Module):
    """A classifier of short texts: the mean of embeddings, then two layers."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.embedding, self.flat = nn.Embedding(20, 4), flat
        self.first, self.last = nn.Linear(12 if flat else 4, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x.flatten(1) if self.flat else x.mean(1)
        return self.last(torch.tanh(self.first(x)))


class Beside(nn.Module):
    """A constant and a learned vector beside the inputs."""

    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.linspace(-1, 1, 2))
        self.context = nn.Parameter(torch.linspace(-0.5, 0.5, 3))
        self.first, self.last = nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rest = [each.expand(x.shape[0], -1) for each in (self.constant, self.context)]
        return self.last(torch.tanh(self.first(torch.cat([x, *rest], 1))))


class Images(nn.Module):
    """A convolutional body with batch norm, whose head alone adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ELU(), nn.Flatten(), nn.Linear(12, 5)
        )
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.body(x)))))


def head(name: str, _: Tensor) -> bool:
    return name.startswith(("first", "last"))


def words(*front: int) -> Tensor:
    return torch.randint(20, (*front, 3))


def rows(*front: int) -> Tensor:
    return torch.randn(*front, 4).double()


def images(*front: int) -> Tensor:
    return torch.randn(*front, 1, 4, 4).double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "mean of embeddings": (lambda: Words(False), words),
    "embeddings side by side": (lambda: Words(True), words),
    "beside the inputs": (Beside, rows),
    "convolutions": (Images, images),
}


def data(draw: Callable[..., Tensor], steps: int = 0) -> tuple[Batch, Batch]:
    front = (3, steps, 5) if steps else (3, 5)
    support = draw(*front), torch.randint(3, front)
    return support, (draw(3, 4), torch.randint(3, (3, 4)))


def compare(
    model: nn.Module, support: Any, query: Any, leaves: list[Tensor], **options: Any
) -> None:
    """The fused step's outcome and gradients are those of the general path."""
    found: list[list[Tensor]] = []
    for executor in ("fused", "generic"):
        out = fastmeta.maml_step(
            model, support, query, inner_steps=2, inner_lr=0.3, executor=executor, **options
        )
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        found.append([out.query_outputs, out.loss] + [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ])  # fmt: skip
        assert (out.executor == "fused-cpu") == (executor == "fused")
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 2], ids=["one-set", "per-step"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_front_that_torch_runs(name: str, steps: int, first_order: bool) -> None:
    make, draw = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double()
    compare(
        model, *data(draw, steps), [*model.parameters()], adapt=head,
        per_step_support=bool(steps), first_order=first_order,
    )  # fmt: skip


@pytest.mark.parametrize("whose", ["support", "query", "both"])
@pytest.mark.parametrize("network", ["mlp", "residual", "body"])
def test_inputs_that_require_grad(network: str, whose: str) -> None:
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.norm(x + self.first(x))) + x)

    layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model = (Residual() if network == "residual" else layers).double()
    support, query = data(rows)
    leaves: list[Tensor] = [*model.parameters()]
    for part, (x, _) in (("support", support), ("query", query)):
        if whose in (part, "both"):
            leaves.append(x.requires_grad_())
    options: dict[str, Any] = {"adapt": lambda n, _: n.startswith("4")} if network == "body" else {}
    compare(model, support, query, leaves, step_weights=[0.2, 0.3, 1.0], **options)


def test_task_weights_and_update_rules() -> None:
    torch.manual_seed(0)
    model = Beside().double()
    support, query = data(rows)
    support[0].requires_grad_()
    weights = torch.tensor([0.2, 0.0, 1.5]).double()
    compare(
        model, support, query, [*model.parameters(), support[0]], adapt=head, task_weights=weights,
        inner_optimizer=SGD(momentum=0.9), prox=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["tasks", "features"])
def test_inputs_that_are_no_leaves(engine: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_ENGINE", engine)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    encoder = nn.Linear(4, 4).double()
    (sx, sy), (qx, qy) = data(rows)
    found: list[Tensor] = []
    for executor in ("fused", "generic"):
        support, query = (torch.tanh(encoder(sx)), sy), (torch.tanh(encoder(qx)), qy)
        out = fastmeta.maml_step(model, support, query, inner_lr=0.3, executor=executor)
        encoder.zero_grad()
        out.loss.backward()
        assert encoder.weight.grad is not None
        found.append(encoder.weight.grad)
    torch.testing.assert_close(*found)


def test_an_embedding_that_adapts_stays_on_another_path() -> None:
    support, query = data(words)
    out = fastmeta.maml_step(Words(True).double(), support, query)
    assert "fused" not in out.executor


def test_nothing_is_differentiated_without_grad() -> None:
    model = Words(True).double()
    support, query = data(words)
    with torch.no_grad():
        out = fastmeta.maml_step(model, support, query, adapt=head, executor="fused")
    assert not out.loss.requires_grad


def test_it_is_told() -> None:
    support, query = data(words)
    told = fastmeta.explain(Words(True).double(), support, query, adapt=head)
    assert "behind layers that torch runs once" in told


def test_inputs_that_lie_otherwise_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    (_, sy), (_, qy) = data(rows)
    sx = torch.randn(3, 4, 5).double().requires_grad_().transpose(1, 2)
    qx = torch.randn(3, 4, 4).double().requires_grad_().transpose(1, 2)
    compare(model, (sx, sy), (qx, qy), [*model.parameters(), sx, qx])


def test_a_front_that_learns_nothing_asks_for_no_derivatives() -> None:
    model = Words(True).double()
    model.embedding.requires_grad_(False)
    compare(model, *data(words), [p for p in model.parameters() if p.requires_grad], adapt=head)


def test_a_parameter_of_the_front_that_the_loss_reads_too() -> None:
    torch.manual_seed(0)
    model = Beside().double()
    context = model.context

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        scaled = prediction * context.exp()
        return (scaled.logsumexp(-1) - scaled.gather(1, target[:, None]).squeeze(1)).mean()

    compare(model, *data(rows), [*model.parameters()], adapt=head, loss_fn=loss_fn)
