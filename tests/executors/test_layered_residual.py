"""Residual networks by the compiled convolutional step: sums of every form, by the oracle."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from convolutional import (
    OPTIONS,
    TOLERANCE,
    Block,
    apart,
    batch,
    check,
    check_ragged,
    flat,
    running,
)
from torch import Tensor, nn

import fastmeta
from fastmeta.wording import counted

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")


def norm(channels: int) -> nn.Module:
    made = nn.BatchNorm2d(channels, track_running_stats=False)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.uniform_(made.bias, -0.5, 0.5)
    return made


class Projected(nn.Module):
    """Of ResNet-12: three convolutions beside a projection of their input, then pooling."""

    def __init__(self, inputs: int, outputs: int, pool: int = 2) -> None:
        super().__init__()
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(w, outputs, 3, padding=1, bias=False) for w in widths)
        self.norms = nn.ModuleList(norm(outputs) for _ in range(4))
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        h = F.leaky_relu(self.norms[1](self.convs[1](h)), 0.1)
        h = self.norms[2](self.convs[2](h))
        h = self.added(h, self.norms[3](self.project(x)))
        return F.max_pool2d(F.leaky_relu(h, 0.1), self.pool)

    def added(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Turned(Projected):
    def added(self, a: Tensor, b: Tensor) -> Tensor:
        return b + a


class OfTorch(Projected):
    def added(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.add(b, a)


class InPlace(Projected):
    def added(self, a: Tensor, b: Tensor) -> Tensor:
        a += b
        return a


class Basic(nn.Module):
    """Of ResNet-18: two convolutions beside their input, or a strided projection of it."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, make: Callable[[int], nn.Module] = norm
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norms = nn.ModuleList(make(outputs) for _ in "ab")
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), make(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.first(x)))
        out = self.norms[1](self.second(out))
        out += self.shortcut(x)
        return self.relu(out)


class Twice(nn.Module):
    """A sum of three, the last of them behind an activation; three layers read the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(inputs, outputs, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (conv(x) for conv in self.convs)
        return F.relu(a + F.relu(b) + c)


class Rows(nn.Module):
    """A residual sum of linear layers, without a bias in front of a norm."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 7), nn.Linear(7, 7, bias=False)
        self.norm, self.last = nn.BatchNorm1d(7), nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x.flatten(1)))
        return self.last(F.relu(self.norm(self.second(h)) + h))


class SumToMean(nn.Module):
    """A sum that nothing follows but the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).mean((2, 3))


def pooled(width: int, classes: int = 3) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), *flat(width, classes)]


NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, int, int]]] = {
    "resnet12": (lambda: [Projected(3, 4), Projected(4, 5), *pooled(5)], (3, 9, 11)),
    "winograd": (lambda: [Projected(3, 16), Projected(16, 20), *flat(20 * 16)], (3, 17, 16)),
    "identity": (lambda: [Block(2, 6, pool=1), Basic(6, 6), Basic(6, 6), *pooled(6)], (2, 7, 6)),
    "strided": (
        lambda: [Block(2, 4, pool=1), Basic(4, 6, 2), Basic(6, 6), Basic(6, 5, 2), *pooled(5)],
        (2, 9, 7),
    ),
    "data-read-twice": (lambda: [Basic(2, 5, 2), Basic(5, 5), *flat(5 * 12)], (2, 5, 7)),
    "no-norm": (
        lambda: [nn.Conv2d(1, 4, 3), Basic(4, 4, 1, lambda _: nn.Identity()), *flat(4 * 9)],
        (1, 5, 5),
    ),
    "running-norm": (lambda: [Basic(2, 4, 2, running), *pooled(4)], (2, 7, 7)),
    "pooled-identity": (
        lambda: [Block(1, 4), Basic(4, 4), nn.MaxPool2d(2), Basic(4, 4), *flat(16)], (1, 9, 8),
    ),
    "three": (lambda: [Block(1, 4, pool=1), Twice(4, 5), *pooled(5)], (1, 5, 6)),
    "three-of-data": (lambda: [Twice(2, 17), *pooled(17)], (2, 6, 5)),
    "rows": (lambda: [Block(1, 4), Rows(16)], (1, 5, 5)),
    "sum-to-mean": (lambda: [Block(1, 4), SumToMean(4), nn.Linear(4, 3)], (1, 7, 7)),
    # Several chunks of images, and several strips of the data's block.
    "large-images": (lambda: [Projected(1, 16), Projected(16, 16, 3), *pooled(16)], (1, 50, 41)),
}  # fmt: skip
MAIN = ("resnet12", "identity", "strided")


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, tuple[int, ...]]:
    make, image = NETWORKS[name]
    return nn.Sequential(*make()).to(dtype), image


@pytest.fixture(params=extension.instruction_sets())
def instruction_set(request, monkeypatch) -> str:
    monkeypatch.setenv("FASTMETA_ISA", request.param)
    return request.param


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, instruction_set: str) -> None:
    model, image = build(name)
    check(model, batch(image, 2, 3), batch(image, 2, 4), {"inner_steps": 2})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [*MAIN, "data-read-twice"])
def test_options(name: str, options: dict[str, Any]) -> None:
    model, image = build(name)
    check(model, batch(image, 3, 3), batch(image, 3, 4), options)


@pytest.mark.parametrize("form", [Turned, OfTorch, InPlace])
def test_sums_however_they_are_written(form: type[Projected]) -> None:
    model = nn.Sequential(form(2, 4), form(4, 3), *flat(12))
    check(model.double(), batch((2, 9, 8), 2, 3), batch((2, 9, 8), 2, 4), {"inner_steps": 1})


BODIES = {
    # What adapts, and how many blocks are run once: those in front of a whole residual block.
    "the-last-layer": (("4.",), 8),
    "a-residual-block": (("1.",), 4),
    "inside-of-it": (("1.convs.2", "4."), 4),
    "its-projection": (("1.project",), 4),
    "inside-of-the-first": (("0.convs.1",), 0),
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("first_order", [False, True])
def test_bodies_end_where_one_value_crosses(case: str, first_order: bool) -> None:
    prefixes, blocks = BODIES[case]
    model, image = build("resnet12")
    data = [batch(image, 2, 3), batch(image, 2, 4)]
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    options: dict[str, Any] = {"first_order": first_order}
    weights = torch.tensor([0.2, 0.3, 0.5]).double()
    expected = oracle.maml(
        model, oracle.split(*data), list(model.parameters()), steps=2, adapted=names,
        rate=lambda *_: 0.1, step_weights=weights, **options,
    )  # fmt: skip
    options |= {"inner_lr": 0.1, "inner_steps": 2, "adapt": names, "executor": "layered"}
    out = fastmeta.maml_step(model, *data, step_weights=weights, **options)
    assert out.executor == "layered-cpu"
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    assert apart(gradients, expected.gradients) < TOLERANCE
    plan = fastmeta.explain(model, *data, **options)
    assert f"{counted(blocks, 'block')} run once" in plan


def test_explain_counts_the_body_once() -> None:
    model, image = build("resnet12")
    tasks, support, query, steps = 2, 3, 4, 2
    data = [batch(image, tasks, support), batch(image, tasks, query)]
    body: list[int] = []

    def count(module: Any, _: Any, output: Tensor) -> None:
        body.append(2 * output[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(data[0][0][0])
    for module in model.modules():
        module._forward_hooks.clear()
    flops = [
        int(re.search(r"arithmetic: ([\d,]+)", fastmeta.explain(
            model, *data, inner_steps=steps, adapt=names
        ))[1].replace(",", ""))
        for names in (None, ["4.weight", "4.bias"])
    ]  # fmt: skip
    # Forward and backward once, in place of those and the Hessian-vector product at every step.
    assert flops[0] - flops[1] == tasks * sum(body) * (9 * steps - 3) * support


@pytest.mark.parametrize("each", [False, True], ids=["tensors", "elements"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MAIN)
def test_learned_rates(name: str, first_order: bool, each: bool) -> None:
    model, image = build(name)
    data = [batch(image, 2, 3), batch(image, 2, 4)]
    rates = {
        n: (0.05 + 0.1 * torch.rand(2, *(p.shape if each else [1] * p.dim()))).double()
        for n, p in model.named_parameters()
    }
    leaves = [*model.parameters(), *(rate.requires_grad_() for rate in rates.values())]
    expected = oracle.maml(
        model, oracle.split(*data), leaves, steps=2, rate=lambda n, k: rates[n][k],
        first_order=first_order,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, *data, inner_lr=rates, inner_steps=2, executor="layered", first_order=first_order
    )
    assert out.executor == "layered-cpu"
    assert apart(torch.autograd.grad(out.loss, leaves), expected.gradients) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet12", "no-norm", "running-norm"])
def test_tasks_of_different_sizes(name: str) -> None:
    check_ragged(*build(name))


@pytest.mark.parametrize("name", ["resnet12", "winograd", "strided"])
def test_float32(name: str, instruction_set: str) -> None:
    """By rounding alone: the sums of each block have at most 300 terms."""
    model, image = build(name, torch.float32)
    data = [batch(image, 2, n, torch.float32) for n in (4, 5)]
    exact = copy.deepcopy(model).double()
    wide = [(x.double(), y) for x, y in data]
    expected = oracle.maml(exact, oracle.split(*wide), list(exact.parameters()), steps=1)
    out = fastmeta.maml_step(model, *data, executor="layered")
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    assert apart(gradients, expected.gradients) < 300 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["winograd", "strided"])
def test_threads_change_no_bit(name: str, instruction_set: str) -> None:
    model, image = build(name, torch.float32)
    data = [batch(image, 5, n, torch.float32) for n in (4, 6)]

    def gradients(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = fastmeta.maml_step(model, *data, inner_steps=2, executor="layered")
            found = torch.autograd.grad(out.loss, list(model.parameters()))
        finally:
            torch.set_num_threads(before)
        return torch.cat([g.flatten() for g in found])

    assert torch.equal(gradients(1), gradients(2))


def test_ties_and_zeros_of_sums_fall_as_in_torch() -> None:
    """Few values: windows whose greatest sums are equal, and sums of zero."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), SmallSum(3), SmallSum(3), *flat(12)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    data = [(x.round().clamp(-1, 1), y) for x, y in (batch((1, 9, 8), 4, 5) for _ in "ab")]
    check(model, *data, {"inner_steps": 1}, rate=0.0)


class SmallSum(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.project = (nn.Conv2d(width, width, 1, bias=False) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv(x) + self.project(x)), 2)


@pytest.mark.parametrize("side", [7, 14])
def test_where_a_sum_is_constant_the_first_is_the_greatest(side: int) -> None:
    """A scale of zero leaves constant images to both convolutions of a sum that is pooled."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Conv2d(16, 32, 3, padding=1) for _ in "ab")
            self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norms[0](self.left(x)) + self.norms[1](self.right(x)))

    stem = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, Sum(), nn.MaxPool2d(2), *flat(32 * (side // 2) ** 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(0.1)
        for each in model[3].norms:
            each.bias.fill_(0.1)
    data = [batch((1, side, side), 2, n, torch.float32) for n in (14, 15)]
    exact = copy.deepcopy(model).double()
    wide = oracle.split(*((x.double(), y) for x, y in data))
    expected = oracle.maml(exact, wide, list(exact.parameters()), steps=1).gradients
    out = fastmeta.maml_step(model, *data, executor="layered")
    assert out.executor == "layered-cpu"
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    assert apart(ours, expected) < 1e-4


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_models(steps: int) -> None:
    model, image = build("resnet12")
    support, query = batch(image, 3, 4), batch(image, 3, 5)
    adapted = fastmeta.adapt(model, support, inner_lr=0.1, inner_steps=steps, executor="layered")
    expected = oracle.maml(
        model, oracle.split(support, query), list(model.parameters()), steps=steps,
        rate=lambda *_: 0.1,
    )  # fmt: skip
    outputs = adapted(query[0])
    torch.testing.assert_close(outputs, torch.stack(expected.query_outputs).detach())


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(2, 2, 3, padding=1) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (h + self.second(F.relu(h))).flatten(1)


class OfActivations(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(self.first(x)) + F.relu(self.second(x))).flatten(1)


class OfData(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x)))).flatten(1)


DECLINED = {
    "read-as-it-is": (PreActivation, "changes what others read as it is"),
    "both-activated": (OfActivations, "adds nothing that comes from a convolution"),
    "data": (OfData, "adds what is no convolution's output"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_sums_that_it_declines_say_why(name: str) -> None:
    make, reason = DECLINED[name]
    model = nn.Sequential(make(), nn.Linear(2 * 30, 3))
    data = [batch((2, 5, 6), 2, 3, torch.float32) for _ in "ab"]
    assert fastmeta.maml_step(model, *data, executor="layered").executor == "layered-torch"
    assert reason in fastmeta.explain(model, *data, executor="layered")


@pytest.mark.parametrize("seed", range(3))
def test_corners_that_rounding_turns_are_no_error(seed: int) -> None:
    """In float32 some maximum of so deep a network falls otherwise than in the loop."""
    torch.manual_seed(seed)
    widths = itertools.pairwise((3, 16, 32, 64, 128))
    model = nn.Sequential(*(Projected(*pair) for pair in widths), *pooled(128))
    data = [batch((3, 32, 32), 2, n, torch.float32) for n in (5, 8)]
    assert fastmeta.maml_step(model, *data).executor == "layered-cpu"
