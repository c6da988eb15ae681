"""Whole networks by the layered executor against the float64 oracle, with every option."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import rates
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.arguments import plan_step
from fastmeta.executors.layers import program
from fastmeta.executors.layers.lowering import lower
from fastmeta.executors.layers.passes import LayerPass
from fastmeta.options import Options
from fastmeta.plan.snapshot import snapshot
from fastmeta.wording import counted

CLASSES = 3


@pytest.fixture(autouse=True)
def rules_alone(without) -> None:
    """The compiled step has tests of its own."""
    without("layered-cpu")


def norm(kind: str, channels: int, side: int) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(channels, 1e-2),
        "plain": lambda: nn.BatchNorm2d(channels, 1e-2, affine=False, track_running_stats=False),
        "group": lambda: nn.GroupNorm(2, channels, 1e-2),
        "layer": lambda: nn.LayerNorm([channels, side, side], 1e-2),
    }
    return made[kind]()


def conv4(kind: str = "batch", activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Pooled to nothing but one pixel, from an odd side."""
    parts: list[nn.Module] = []
    side = 9
    for channels in (2, 4, 4):
        parts += [nn.Conv2d(channels, 4, 3, padding=1), norm(kind, 4, side), activation()]
        parts += [nn.MaxPool2d(2)]
        side //= 2
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4, CLASSES))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.norms = nn.ModuleList(norm("plain", 4, 1) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)))
        h = F.relu(self.norms[1](self.second(h)))
        return self.head(h.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Of ResNet-12: three convolutions beside a projection, then pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(w, outputs, 3, padding=1, bias=False) for w in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, 1e-2) for _ in widths)
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        h = F.leaky_relu(self.norms[1](self.convs[1](h)), 0.1)
        h = self.norms[2](self.convs[2](h))
        return F.max_pool2d(F.leaky_relu(h + self.norm(self.project(x)), 0.1), 2)


def resnet() -> nn.Module:
    return nn.Sequential(
        ResidualBlock(2, 3), ResidualBlock(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 3, groups=4, stride=2, padding="valid"),
        nn.BatchNorm2d(4, 1e-2), nn.SiLU(), nn.Conv2d(4, 5, 1), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(20, CLASSES),
    )  # fmt: skip


class AllConvolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 5, 3, padding="same")
        self.head = nn.Conv2d(5, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).mean(dim=(-1, -2))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv4": conv4,
    "conv4-group-norm": lambda: conv4("group", nn.GELU),
    "conv4-layer-norm": lambda: conv4("layer", nn.ELU),
    "strided": Strided,
    "resnet": resnet,
    "separable": separable,
    "all-convolutional": AllConvolutional,
}


def examples(tasks: int, count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(tasks, count, 2, 9, 9).double()
    return x, torch.randint(CLASSES, (tasks, count))


def agrees(
    model: nn.Module, data: list[tuple[Any, Any]], names: list[str] | None = None, steps: int = 2,
    leaves: tuple[Tensor, ...] = (), rate: Any = None, inner_lr: Any = 0.1, memory: str = "auto",
    **options: Any,
) -> None:  # fmt: skip
    """Everything that a step gives, to 1e-9 of the oracle's in float64."""
    wanted = [p for p in model.parameters() if p.requires_grad] + list(leaves)
    reference = oracle.maml(
        model, oracle.split(*data), wanted, rate=rate or (lambda *_: 0.1), steps=steps,
        adapted=names, **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, *data, inner_lr=inner_lr, inner_steps=steps, adapt=names, executor="layered",
        memory=memory, **options,
    )  # fmt: skip
    assert out.executor == "layered-torch"
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out.task_losses, reference.task_losses, **close)
    if steps:
        losses = torch.stack([torch.stack(each) for each in reference.support_losses], dim=1)
        torch.testing.assert_close(out.support_losses, losses, **close)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, **close)
    gradients = torch.autograd.grad(out.loss, wanted, allow_unused=True)
    for got, expected, leaf in zip(gradients, reference.gradients, wanted, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if got is None else got, zero if expected is None else expected, **close
        )


def two_sets(tasks: int = 3, support: int = 3, query: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [examples(tasks, support), examples(tasks, query)]


def names_of(model: nn.Module, part: str) -> list[str]:
    named = [name for name, _ in model.named_parameters()]
    return {"all": named, "head": named[-2:], "body": named[:-2], "one": named[2:3]}[part]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network: str, steps: int) -> None:
    agrees(NETWORKS[network]().double(), two_sets(), steps=steps)


@pytest.mark.parametrize("part", ["head", "body", "one"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_part_adapts(network: str, part: str) -> None:
    model = NETWORKS[network]().double()
    agrees(model, two_sets(), names_of(model, part), prox=0.3)


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second-order", "first-order"])
@pytest.mark.parametrize("network", ["conv4", "resnet"])
def test_every_step_has_its_query_loss(network: str, first_order: bool, memory: str) -> None:
    weights = torch.tensor([0.5, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    of_tasks = torch.tensor([0.2, 0.0, 1.3], dtype=torch.float64, requires_grad=True)
    agrees(
        NETWORKS[network]().double(), two_sets(), leaves=(weights, of_tasks), memory=memory,
        first_order=first_order, step_weights=weights, task_weights=of_tasks, prox=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("part", ["all", "head"])
@pytest.mark.parametrize("kind", rates.KINDS)
def test_learned_rates(kind: str, part: str, memory: str) -> None:
    model = conv4("plain", nn.Softplus).double()
    names = names_of(model, part)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    inner_lr = rates.by_kind(kind, 2, shapes)
    agrees(
        model, two_sets(), names, leaves=tuple(rates.leaves(inner_lr)), inner_lr=inner_lr,
        rate=rates.reader(kind, inner_lr), memory=memory, prox=0.4,
    )  # fmt: skip


WEIGHT = torch.tensor([0.5, 2, 1]).double()
LOSSES: dict[str, tuple[Callable[[Any, Any], Tensor], bool]] = {
    "smoothed": (
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
        True,
    ),
    "ignored": (nn.CrossEntropyLoss(WEIGHT, ignore_index=1), True),
    "probabilities": (nn.CrossEntropyLoss(label_smoothing=0.2), False),
    "mse": (F.mse_loss, False),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), False),
    "huber": (nn.HuberLoss(delta=0.3), False),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.3), False),
    "l1": (F.l1_loss, False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss_fn, labels = LOSSES[name]
    data = two_sets()
    if labels:
        for _, y in data:
            y[:, 0] = 0  # no mean is of nothing
    else:
        data = [(x, torch.rand(*y.shape, CLASSES).double()) for x, y in data]
    agrees(Strided().double(), data, loss_fn=loss_fn)


def test_some_tasks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmeta.executors.layers.program._LARGEST", 1)
    inner_lr = rates.by_kind("per-step", 2, {})
    agrees(
        conv4().double(), two_sets(5), leaves=(inner_lr,), inner_lr=inner_lr,
        rate=rates.reader("per-step", inner_lr),
    )  # fmt: skip


def test_memory_does_not_grow_with_the_number_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment no more passes are alive than one task needs."""
    monkeypatch.setattr("fastmeta.executors.layers.program._LARGEST", 1)
    alive: weakref.WeakSet[LayerPass] = weakref.WeakSet()
    most: dict[int, int] = {}
    make = LayerPass.__init__

    def counted(self: LayerPass, *given: Any) -> None:
        make(self, *given)
        alive.add(self)
        most[tasks] = max(most.get(tasks, 0), len(alive))

    model = conv4().double()
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 3, "executor": "layered"}
    options["adapt"] = names_of(model, "head")
    fastmeta.maml_step(model, *two_sets(1), **options)  # the plan's trial
    monkeypatch.setattr(LayerPass, "__init__", counted)
    for tasks in (1, 5):
        fastmeta.maml_step(model, *two_sets(tasks), **options)
    assert most[5] == most[1]


def test_frozen_layers_and_running_statistics() -> None:
    model = conv4().double()
    model(torch.randn(8, 2, 9, 9).double())
    model[0].requires_grad_(False)
    model[5].requires_grad_(False)
    agrees(model.eval(), two_sets())


def test_one_example_of_one_task() -> None:
    agrees(conv4("group").double(), two_sets(1, 1, 1))


def test_one_number_has_no_variance() -> None:
    model = nn.Sequential(nn.Conv2d(2, CLASSES, 9), nn.BatchNorm2d(CLASSES), nn.Flatten()).double()
    fastmeta.maml_step(model, *two_sets(2, 3, 2), inner_lr=0.1, executor="layered")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fastmeta.maml_step(model, *two_sets(2, 3, 1), inner_lr=0.1, executor="layered")


def test_tasks_of_different_sizes() -> None:
    model = conv4().double()
    sets = [
        [(torch.randn(n, 2, 9, 9).double(), torch.randint(CLASSES, (n,))) for n in counts]
        for counts in ((3, 5, 3), (4, 2, 2))
    ]
    leaves = list(model.parameters())
    tasks = [(*s, *q) for s, q in zip(*sets, strict=True)]
    reference = oracle.maml(model, tasks, leaves, rate=lambda *_: 0.1, steps=2)
    out = fastmeta.maml_step(model, *sets, inner_lr=0.1, inner_steps=2, executor="layered")
    assert out.executor == "layered-torch"
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_the_inner_loop_alone() -> None:
    model, support = conv4().double(), examples(3, 4)
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2}
    ours = fastmeta.adapt(model, support, executor="layered", **options)
    theirs = fastmeta.adapt(model, support, executor="generic", **options)
    for name, tensor in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
def test_float32_is_as_close_as_autograd_in_float32(network: str) -> None:
    model, data = NETWORKS[network]().double(), two_sets()
    single = copy.deepcopy(model).float()
    narrow = [(x.float(), y) for x, y in data]
    exact, rounded = (
        oracle.maml(m, oracle.split(*d), list(m.parameters()), rate=lambda *_: 0.1, steps=2)
        for m, d in ((model, data), (single, narrow))
    )
    out = fastmeta.maml_step(single, *narrow, inner_lr=0.1, inner_steps=2, executor="layered")
    found = torch.autograd.grad(out.loss, list(single.parameters()))
    whole = [torch.cat([g.double().flatten() for g in gs]) for gs in
             (exact.gradients, rounded.gradients, found)]  # fmt: skip
    spread, error = ((w - whole[0]).norm() / whole[0].norm() for w in whole[1:])
    # Another order of sums than autograd's, over 9 x 9 pixels, 3 x 3 windows and 4 channels.
    assert error <= 8 * spread + 64 * torch.finfo(torch.float32).eps


def test_the_plan_takes_the_rules_where_there_are_convolutions() -> None:
    """`docs/design.md`, "The layers' rules", has the times that this goes by."""
    data = two_sets()
    convolutional, flat = resnet().double(), nn.Sequential(nn.Flatten(), nn.Linear(162, CLASSES))
    assert fastmeta.maml_step(convolutional, *data, inner_lr=0.1).executor == "layered-torch"
    low = fastmeta.maml_step(convolutional, *data, inner_lr=0.1, memory="low")
    assert low.executor == "generic"
    assert fastmeta.maml_step(flat.double(), *data, inner_lr=0.1).executor != "layered-torch"


def test_what_each_layer_keeps() -> None:
    model, data = resnet().double(), two_sets()
    options: dict[str, Any] = {
        "inner_lr": 0.1, "inner_steps": 2, "adapt": names_of(model, "head"), "executor": "layered",
    }  # fmt: skip
    lines = fastmeta.explain(model, *data, **options).splitlines()
    step = plan_step(model, snapshot(model), *data, Options(**options), True)
    planned = step.groups[0][1]
    made = program.program(planned.problem, lower(planned.selected.reading))
    kept, nodes = made.workspaces, len(made.workspaces)
    assert lines[0].startswith(f"model: Sequential, {nodes} layers")
    # Of the first, 3 channels of 9 x 9: output and gradient for 3 tasks of 3 + 4 examples, once.
    assert kept[0] == 3 * (3 + 4) * 2 * 3 * 81 * 8
    # The last one adapts: 3 numbers, their gradient and the tangents of both, at each of 2 steps.
    assert kept[-1] == 3 * (2 * 3 + 4) * 4 * CLASSES * 8
    assert f"workspace: about {sum(kept):,} bytes" in "\n".join(lines)
    assert f"{counted(nodes - 1, 'layer')} run once" in "\n".join(lines)
