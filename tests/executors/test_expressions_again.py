"""Losses by formula that agree on the first data, and must on the next: a trace outlives a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_kernels import cpu_only
from torch import Tensor, nn

import fastmeta

pytestmark = cpu_only

Loss = Callable[[Any, Any], Tensor]


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def agree(model: nn.Module, x: Tensor, y: Any, loss: Loss, leaves: list[Tensor]) -> str:
    """The step, which the general path repeats; what computed it."""
    found: list[Any] = []
    for executor in ("auto", "generic"):
        out = fastmeta.maml_step(
            model, (x, y), (x, y), inner_lr=0.1, inner_steps=2, loss_fn=loss, executor=executor
        )
        grads = torch.autograd.grad(out.loss, [*model.parameters(), *leaves], allow_unused=True)
        found.append((out, grads))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours.loss, theirs.loss)
    for a, b in zip(gradients, expected, strict=True):
        if b is not None:
            assert a is not None
            assert float((a - b).norm()) <= 1e-9 * max(1.0, float(b.norm()))
    return ours.executor


class World:
    """A loss, and what changes after the first step."""

    def __init__(self) -> None:
        self.examples, self.outputs = 7, 2
        self.c = 1.0
        self.w: Tensor = torch.ones(3).double()
        self.learned: list[Tensor] = []
        self.y: Callable[[int], Any] = lambda n: torch.randn(3, n, self.outputs).double()
        self.model: nn.Sequential | None = None


def twice_if(condition: Callable[[Tensor], bool]) -> Loss:
    return lambda p, y: (p - y).square().mean() * (2 if condition(p) else 1)


def one_example(world: World) -> None:
    world.examples = 1


def even(world: World) -> None:
    world.examples = 8


def other_weights(world: World) -> None:
    world.w.copy_(torch.tensor([0.5, -1.0, 2.0]))


def labels_to_ignore(world: World) -> None:
    world.y = lambda n: torch.tensor([0, 1, -100] * n)[:n].expand(3, n)


def two_heads(world: World) -> Loss:
    world.outputs = 4
    world.y = lambda n: torch.randint(2, (3, n, 2))

    def loss(p: Tensor, y: Tensor) -> Tensor:
        a, b = p.chunk(2, -1)
        return F.cross_entropy(a, y[:, 0]) + F.cross_entropy(b, y[:, 1])

    return loss


def some_ignored(world: World) -> None:
    world.y = lambda n: torch.randint(2, (3, n, 2)).index_fill(1, torch.tensor(0), -100)


def hidden_labels(world: World) -> Loss:
    world.y = lambda n: torch.ones(3, n, dtype=torch.int64)
    return lambda p, y: F.cross_entropy(p, torch.where(y > 0, y, -100)) + 0.1 * p.mean()


def some_hidden(world: World) -> None:
    world.y = lambda n: torch.arange(n).remainder(2).expand(3, n)


def by_column(world: World) -> Loss:
    w = world.w
    return lambda p, y: (
        (p[:, 0] - y[:, 0]).square() * torch.exp(-w[0]) + (p[:, 1] - y[:, 1]).square() * w[2]
    ).mean()


def learned_by_column(world: World) -> Loss:
    world.w = torch.zeros(5).double().requires_grad_()
    world.learned = [world.w]
    w = world.w
    return lambda p, y: ((p - y).square() * torch.exp(-w[1]) + w[1:3]).mean()


def epsilon(world: World) -> Loss:
    return lambda p, y: (
        (-torch.log(p.softmax(-1).clamp(min=torch.finfo(p.dtype).eps)) * y.softmax(-1))
        .sum(-1)
        .mean()
    )


def steep_model(world: World) -> None:
    assert world.model is not None
    with torch.no_grad():
        world.model[2].weight.mul_(60)


def masked(world: World) -> Loss:
    world.y = lambda n: (torch.randn(3, n, 2).double(), torch.ones(3, n, 2, dtype=torch.int64))
    return lambda p, y: ((p - y[0]).square() * y[1].to(torch.bool)).mean()


def masks_of_more(world: World) -> None:
    world.y = lambda n: (torch.randn(3, n, 2).double(), torch.randint(4, (3, n, 2)))


def typed(world: World) -> Loss:
    def make(c: float) -> Loss:
        def loss(p: Tensor, y: Tensor) -> Tensor:
            e = (p - y).square().mean()
            return e * c if isinstance(c, float) and c > 1 else e

        return loss

    return lambda p, y: make(world.c)(p, y)


def caught(world: World) -> Loss:
    def loss(p: Tensor, y: Tensor, c: float = 1.0) -> Tensor:
        try:
            factor = max(c, 1.5)
        except Exception:
            factor = 1.0
        return factor * (p - y).square().mean()

    return loss


def aliased(world: World) -> Loss:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        e = p - y
        alias = e
        e *= 2.0
        return alias.square().mean()

    return loss


def added_up(world: World) -> Loss:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        total = (p - y).square().mean()
        total += 0.1 * p.mean()
        return total

    return loss


def clamped(world: World) -> Loss:
    c = world.c - 1.0
    return lambda p, y: (p.clamp(min=c) - y).square().mean() + p.square().mean()


def zeroed_head(world: World) -> None:
    assert world.model is not None
    with torch.no_grad():
        world.model[2].weight.zero_()
        world.model[2].bias.zero_()


def powers(world: World) -> Loss:
    c = world.c
    return lambda p, y: ((p.abs() ** c) * (y + p)).mean()


CASES: dict[str, tuple[Callable[[World], Loss], Callable[[World], None]]] = {
    "one example": (lambda w: twice_if(lambda p: len(p) == 1), one_example),
    "odd": (lambda w: twice_if(lambda p: p.shape[0] % 2 == 1), even),
    "many": (lambda w: twice_if(lambda p: p.shape[0] > 3), one_example),
    "squeezed": (lambda w: lambda p, y: (p - y).square().squeeze().mean(0).sum(), one_example),
    "two heads": (two_heads, some_ignored),
    "hidden labels": (hidden_labels, some_hidden),
    "columns": (by_column, other_weights),
    "learned columns": (learned_by_column, lambda w: None),
    "epsilon": (epsilon, steep_model),
    "mask": (masked, masks_of_more),
    "kinds": (typed, lambda w: setattr(w, "c", 2.0)),
    "caught": (caught, lambda w: None),
    "alias": (aliased, lambda w: None),
    "added up": (added_up, lambda w: None),
    "clamp": (clamped, zeroed_head),
    "powers": (powers, zeroed_head),
}  # fmt: skip
TRACED = {"squeezed", "columns", "learned columns", "epsilon", "added up", "clamp", "powers"}


@pytest.mark.parametrize("name", CASES)
def test_the_next_step_agrees_too(name: str) -> None:
    make, change = CASES[name]
    world = World()
    loss = make(world)
    model = world.model = network(world.outputs)
    for _ in range(2):
        x = torch.randn(3, world.examples, 3).double()
        executor = agree(model, x, world.y(world.examples), loss, world.learned)
        if world.examples > 1:
            assert (executor == "fused-cpu") == (name in TRACED), executor
        change(world)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(2 * x)


def test_without_gradients_formulas_are_traced_all_the_same() -> None:
    model, x, y = network(2), torch.randn(3, 5, 3).double(), torch.randn(3, 5, 2).double()
    model[1] = Sine()

    def loss(p: Tensor, t: Tensor) -> Tensor:
        return ((p - t) ** 2).mean() + p.mean()

    with torch.no_grad():
        outs = [
            fastmeta.maml_step(model, (x, y), (x, y), loss_fn=loss, inner_lr=rate, executor=how)
            for rate in (0.0, 0.1)
            for how in ("auto", "generic")
        ]
    assert outs[0].executor == outs[2].executor == "fused-cpu"
    torch.testing.assert_close(outs[2].loss, outs[3].loss)
    trained = fastmeta.maml_step(model, (x, y), (x, y), loss_fn=loss, inner_lr=0.1)
    assert trained.executor == "fused-cpu"


def test_what_a_loss_writes_is_written() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, p: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return (p - y).square().mean()

    loss, model = Counting(), network(2)
    x, y = torch.randn(3, 5, 3).double(), torch.randn(3, 5, 2).double()
    seen = []
    for _ in range(3):
        out = fastmeta.maml_step(model, (x, y), (x, y), loss_fn=loss)
        assert out.executor != "fused-cpu"
        seen.append(loss.calls)
    assert seen[0] < seen[1] < seen[2]


POWER = 2


def raised(error: Tensor) -> Tensor:
    return error.abs() ** POWER


def test_what_a_helper_reads_changes(monkeypatch) -> None:
    """A whole number is a part of the trace, also where a function that the loss calls reads it."""
    torch.manual_seed(0)
    model, x, y = network(2), torch.randn(3, 7, 3).double(), torch.randn(3, 7, 2).double()

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return raised(prediction - target).mean()

    for power in (2, 3, 2):
        monkeypatch.setitem(globals(), "POWER", power)
        assert agree(model, x, y, loss, []) == "fused-cpu"


class Named(nn.Module):
    """Its attribute has the name of a function of Python's that must not be called."""

    def __init__(self) -> None:
        super().__init__()
        self.hash = 2.0

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.hash * (prediction - target).square().mean()


def test_an_attribute_is_no_function_of_pythons() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 3).double(), torch.randn(3, 7, 2).double()
    assert agree(network(2), x, y, Named(), []) == "fused-cpu"
