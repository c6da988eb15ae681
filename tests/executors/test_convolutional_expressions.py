"""Curved activations in the compiled convolutional step, by the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from convolutional import OPTIONS, Average, batch, check, check_ragged, flat
from torch import Tensor, nn
from traced_steps import By

import fastmeta

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

SETS = extension.instruction_sets()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": lambda: nn.Softplus(2.0, 1.5),
    "elu": lambda: nn.ELU(0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "leaky, falling": lambda: nn.LeakyReLU(-0.3),
    "mish": nn.Mish,
    "sine": lambda: By(lambda x: torch.sin(3 * x)),
    "steep": lambda: By(lambda x: x * torch.sigmoid(1.7 * x)),
}

Parts = list[nn.Module]
ORDERS: dict[str, Callable[[Parts, nn.Module], Parts]] = {
    "alone": lambda before, f: [*before, f],
    "before the maximum": lambda before, f: [*before, f, nn.MaxPool2d(2)],
    "behind the maximum": lambda before, f: [*before, nn.MaxPool2d((1, 2)), f],
    "before the mean": lambda before, f: [*before, f, nn.AdaptiveAvgPool2d(1)],
}


def norm(width: int) -> nn.Module:
    made = nn.BatchNorm2d(width, eps=0.1, track_running_stats=False)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.uniform_(made.bias, -0.5, 0.5)
    return made


def network(activation: str, order: str, normed: bool = True) -> nn.Sequential:
    """Two blocks: of one that reads shallow data, whose products are not kept, and of another."""
    arrange, layers, x = ORDERS[order], list[nn.Module](), torch.zeros(1, 1, 9, 8)
    for inputs, filters in ((1, 5), (5, 18)):
        before: Parts = [nn.Conv2d(inputs, filters, 3, padding=1, bias=not normed)]
        before += [norm(filters)] if normed else []
        part = nn.Sequential(*arrange(before, ACTIVATIONS[activation]()))
        if inputs == 1 and order == "before the mean":  # which nothing but a linear layer follows
            part = part[:-1]
        layers += part
        x = part(x)
    return nn.Sequential(*layers, *flat(x[0].numel())).double()


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, order: str, normed: bool) -> None:
    data = [batch((1, 9, 8), 2, n) for n in (4, 5)]
    check(network(activation, order, normed), *data, {"inner_steps": 2}, rate=0.03)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("order", ORDERS)
def test_instruction_sets(order: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMETA_ISA", isa)
    check(network("silu", order), *[batch((1, 9, 8), 3, n) for n in (4, 5)], {"inner_steps": 2})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("order", ["before the maximum", "behind the maximum"])
def test_options(order: str, options: dict[str, Any]) -> None:
    check(network("mish", order), *[batch((1, 9, 8), 3, n) for n in (4, 5)], options)


class Residual(nn.Module):
    """A sum in front of the activation, as ResNets have it."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.norm = norm(width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.norm(self.convolution(x)))


@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "sine", "tanh"])
def test_residual_sums(activation: str, pools: bool) -> None:
    make = ACTIVATIONS[activation]
    maximum = [nn.MaxPool2d(2)] if pools else []
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), make(), Residual(4, make()), *maximum, Residual(4, make()),
        Average(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    check(model, *[batch((2, 8, 7), 2, n) for n in (4, 5)], {"inner_steps": 2})


def test_large_images() -> None:
    """Several strips of the first block, and several chunks of images of the second."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1),
        norm(16), nn.SiLU(), nn.MaxPool2d(2), Average(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    check(model, *[batch((1, 63, 70), 2, n) for n in (5, 9)], {"inner_steps": 1})


def test_equal_maxima() -> None:
    """The derivative goes to the first of those that are equal, whatever their arguments are."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), By(torch.square), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1),
        By(torch.square), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape))
        model[0].bias.zero_()
    data = [(x.sign(), y) for x, y in (batch((1, 8, 8), 3, n) for n in (4, 5))]
    check(model, *data, {"inner_steps": 1}, rate=0.0)


def test_tasks_of_different_sizes() -> None:
    check_ragged(network("silu", "before the maximum", normed=False), (1, 9, 8))


def test_options_of_an_activation_may_change() -> None:
    model = network("elu", "alone")
    data = [batch((1, 9, 8), 2, n) for n in (4, 5)]
    for alpha in (0.7, 0.4, 1.3):
        for layer in model:
            if isinstance(layer, nn.ELU):
                layer.alpha = alpha
        check(model, *data, {"inner_steps": 1})


def test_it_is_chosen_by_itself_and_agrees_in_float32() -> None:
    model = network("gelu", "before the maximum").float()
    data = [(x.float(), y) for x, y in (batch((1, 9, 8), 2, n) for n in (4, 5))]
    found = {}
    for executor in ("auto", "generic"):
        out = fastmeta.maml_step(model, *data, inner_steps=2, executor=executor)
        found[executor] = out.executor, torch.autograd.grad(out.loss, list(model.parameters()))
    assert found["auto"][0] == "layered-cpu"
    for ours, theirs in zip(found["auto"][1], found["generic"][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_two_functions_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Tanh(), *flat(2 * 36)).double()
    check(model, *[batch((1, 8, 8), 2, n) for n in (2, 3)], {"inner_steps": 1})


def test_what_fills_a_vector_up_stays_nothing() -> None:
    """Where the function is infinite at 0, as in channels behind the last."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), By(torch.log), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3), By(torch.log),
        *flat(5),
    ).double()  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(0.1)
            layer.bias.fill_(3.0)
    check(model, *[batch((1, 8, 8), 2, n) for n in (2, 3)], {"inner_steps": 2})


def test_what_is_too_long_says_so() -> None:
    def endless(x: Tensor) -> Tensor:
        for i in range(120):
            x = x + 0.01 * torch.sin(x * (1 + i / 10)) * torch.tanh(x)
        return x

    model = nn.Sequential(nn.Conv2d(1, 2, 3), By(endless), *flat(2 * 36)).double()
    data = [batch((1, 8, 8), 2, n) for n in (2, 3)]
    assert fastmeta.maml_step(model, *data, executor="layered").executor == "layered-torch"
    assert "instructions" in fastmeta.explain(model, *data, executor="layered")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Mish])
def test_the_inner_loop_alone(activation: type[nn.Module]) -> None:
    """Planned without gradients, the activation still has its derivatives."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), activation(), nn.Flatten(), nn.Linear(72, 3)
    model = nn.Sequential(*layers).double()
    support = torch.randn(3, 6, 1, 8, 8).double(), torch.arange(3).repeat(3, 2)
    ours, theirs = (
        fastmeta.adapt(model, support, inner_lr=0.5, inner_steps=2, executor=executor).parameters
        for executor in ("layered", "generic")
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])
