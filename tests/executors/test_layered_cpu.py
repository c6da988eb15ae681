"""The convolutional step on the CPU by the float64 oracle: networks, sizes, options, threads."""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from convolutional import (
    OPTIONS,
    TOLERANCE,
    Average,
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

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

SETS = extension.instruction_sets()

NETWORKS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "conv4-small": (lambda: [Block(1, 4), Block(4, 5), *flat(5)], (1, 5, 5)),
    "pools-to-one-pixel": (lambda: [Block(2, 3), Block(3, 17), Block(17, 4), *flat(4)], (2, 9, 8)),
    "strided-mean": (
        lambda: [
            Block(1, 5, pool=1, stride=2),
            Block(5, 6, pool=1, stride=2),
            Average(),
            nn.Linear(6, 3),
        ],
        (1, 11, 9),
    ),
    "one-channel": (lambda: [Block(1, 1), Block(1, 1), *flat(4)], (1, 8, 8)),
    "wide": (lambda: [Block(3, 33), Block(33, 18), *flat(18 * 9)], (3, 14, 13)),
    "kernels": (
        lambda: [
            Block(2, 4, kernel_size=(5, 2), padding=(2, 0), pool=3),
            Block(4, 3, kernel_size=1, padding=0, pool=1),
            *flat(3 * 3 * 3),
        ],
        (2, 10, 11),
    ),
    "stride-past-kernel": (
        lambda: [
            Block(1, 4, kernel_size=3, padding=1),
            Block(4, 4, kernel_size=2, stride=3, padding=0, pool=1),
            *flat(4 * 4),
        ],
        (1, 12, 13),
    ),
    "dilated": (
        lambda: [Block(1, 3, pool=1), Block(3, 4, dilation=2, padding=2), *flat(4 * 9)],
        (1, 7, 6),
    ),
    "no-norm": (
        lambda: [
            nn.Conv2d(2, 4, 3),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 5, 3, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *flat(5 * 4),
        ],
        (2, 8, 9),
    ),
    "pool-before-relu": (
        lambda: [nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), *flat(4 * 9)],
        (1, 8, 8),
    ),
    "running-norm": (
        lambda: [
            nn.Conv2d(1, 4, 3, padding=1),
            running(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, affine=False),
            nn.ReLU(),
            *flat(4 * 16),
        ],
        (1, 6, 6),
    ),
    "two-linear": (
        lambda: [
            Block(1, 4),
            nn.Flatten(),
            nn.Linear(36, 7),
            nn.BatchNorm1d(7),
            nn.ReLU(),
            nn.Linear(7, 3),
        ],
        (1, 7, 7),
    ),
    "all-convolutional": (
        lambda: [Block(1, 4, pool=1), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        (1, 5, 4),
    ),
    # Several strips of the first block, and several chunks of images of the second.
    "large-images": (
        lambda: [Block(1, 16, pool=1), Block(16, 16), Average(), nn.Linear(16, 3)],
        (1, 50, 41),
    ),
    "pooled-strips": (
        lambda: [Block(1, 16, pool=3), Average(), nn.Linear(16, 3)],
        (1, 53, 50),
    ),
    "same-shape-blocks": (lambda: [Block(3, 16), Block(16, 16), *flat(16 * 16)], (3, 19, 16)),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, tuple[int, ...]]:
    make, image = NETWORKS[name]
    return nn.Sequential(*make()).to(dtype), image


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch) -> str:
    monkeypatch.setenv("FASTMETA_ISA", request.param)
    return request.param


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, instruction_set: str) -> None:
    model, image = build(name)
    check(model, batch(image, 3, 4), batch(image, 3, 5), {"inner_steps": 2})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["pools-to-one-pixel", "strided-mean", "no-norm", "running-norm"])
def test_options(name: str, options: dict[str, Any]) -> None:
    model, image = build(name)
    check(model, batch(image, 3, 4), batch(image, 3, 5), options)


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 3), (2, 3, 1), (17, 1, 1)])
def test_few_tasks_and_examples(sizes: tuple[int, int, int]) -> None:
    tasks, support, query = sizes
    model = nn.Sequential(Block(1, 4), Block(4, 4), *flat(4 * 4)).double()
    check(
        model, batch((1, 8, 8), tasks, support), batch((1, 8, 8), tasks, query), {"inner_steps": 1}
    )


LOSSES = {
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double()),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "mse": F.mse_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str) -> None:
    model, image = build("conv4-small")
    support, query = batch(image, 3, 4), batch(image, 3, 5)
    if loss in ("mse", "huber", "bce"):
        support, query = ((x, torch.rand(*y.shape, 3).double()) for x, y in (support, query))
    check(model, support, query, {"inner_steps": 2}, loss_fn=LOSSES[loss])


def test_learned_rates() -> None:
    model, image = build("pools-to-one-pixel")
    support, query = batch(image, 3, 4), batch(image, 3, 5)
    names = [name for name, _ in model.named_parameters()]
    rates = {n: (0.05 + 0.1 * torch.rand(2)).double().requires_grad_() for n in names}
    leaves = [*model.parameters(), *rates.values()]
    expected = oracle.maml(
        model, oracle.split(support, query), leaves, steps=2, rate=lambda n, k: rates[n][k]
    )
    for first_order in (False, True):
        if first_order:
            expected = oracle.maml(
                model, oracle.split(support, query), leaves, steps=2,
                rate=lambda n, k: rates[n][k], first_order=True,
            )  # fmt: skip
        per_step = {n: r.reshape(2, *[1] * model.get_parameter(n).dim()) for n, r in rates.items()}
        out = fastmeta.maml_step(
            model, support, query, inner_lr=per_step, inner_steps=2, executor="layered",
            first_order=first_order,
        )  # fmt: skip
        assert apart(torch.autograd.grad(out.loss, leaves), expected.gradients) < TOLERANCE


@pytest.mark.parametrize("name", ["wide", "strided-mean", "pools-to-one-pixel"])
def test_float32(name: str, instruction_set: str) -> None:
    """By rounding alone: the sums of each block have at most 300 terms."""
    model, image = build(name, torch.float32)
    support, query = (batch(image, 2, n, torch.float32) for n in (4, 5))
    exact = nn.Sequential(*NETWORKS[name][0]()).double()
    exact.load_state_dict(model.state_dict())
    wide = [(x.double(), y) for x, y in (support, query)]
    expected = oracle.maml(exact, oracle.split(*wide), list(exact.parameters()), steps=1)
    out = fastmeta.maml_step(model, support, query, executor="layered")
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    epsilon = torch.finfo(torch.float32).eps
    assert apart(gradients, expected.gradients) < 300 * epsilon


@pytest.mark.parametrize("side", [7, 14])
def test_where_an_image_is_constant_the_first_is_the_greatest(side: int) -> None:
    """A scale of zero leaves constant images to the second convolution; torch takes the first."""
    blocks = [
        [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        for inputs, outputs in ((1, 16), (16, 32))
    ]
    pooled = 32 * (side // 2) ** 2
    model = nn.Sequential(*blocks[0], *blocks[1], nn.MaxPool2d(2), *flat(pooled))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(0.1)
        model[4].bias.fill_(0.1)
    support, query = (batch((1, side, side), 2, n, torch.float32) for n in (14, 15))
    exact = copy.deepcopy(model).double()
    data = oracle.split(*((x.double(), y) for x, y in (support, query)))
    expected = oracle.maml(exact, data, list(exact.parameters()), steps=1).gradients
    out = fastmeta.maml_step(model, support, query, executor="layered")
    assert out.executor == "layered-cpu"
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    assert apart(ours, expected) < 1e-4


def test_threads_change_no_bit(instruction_set: str) -> None:
    model, image = build("wide", torch.float32)
    support, query = (batch(image, 5, n, torch.float32) for n in (4, 6))

    def gradients(threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = fastmeta.maml_step(model, support, query, inner_steps=2, executor="layered")
            found = torch.autograd.grad(out.loss, list(model.parameters()))
        finally:
            torch.set_num_threads(before)
        return torch.cat([g.flatten() for g in found])

    alone = gradients(1)
    for threads in (2, 3):
        assert torch.equal(alone, gradients(threads))


def test_ties_and_zeros_fall_as_in_torch() -> None:
    """Few values: windows with equal maxima, and activations at zero."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1, bias=False), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False),
        nn.LeakyReLU(0.25), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * 1, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape))
    support, query = (
        (x.round().clamp(-1, 1), y) for x, y in (batch((1, 7, 7), 4, 5) for _ in "ab")
    )
    check(model, support, query, {"inner_steps": 1}, rate=0.0)


def test_it_is_chosen_by_itself() -> None:
    model, image = build("wide", torch.float32)
    out = fastmeta.maml_step(model, *(batch(image, 2, 4, torch.float32) for _ in "ab"))
    assert out.executor == "layered-cpu"


DECLINED = {
    "groups": ([nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), *flat(4 * 36)], "groups"),
    "overlapping": (
        [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 1), *flat(4 * 16)],
        "overlap",
    ),
    "no-convolution": ([nn.Flatten(), nn.Linear(2 * 64, 3)], "no convolution"),
    "norm-behind-pool": (
        [nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), *flat(4 * 9)],
        "BatchNorm",
    ),
}


def why_not_compiled(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> str:
    """Of a problem that the layers' rules serve in the compiled step's place."""
    out = fastmeta.maml_step(model, *data, executor="layered", **options)
    assert out.executor == "layered-torch"
    plan = fastmeta.explain(model, *data, executor="layered", **options)
    return next(line for line in plan.splitlines() if "not layered-cpu: " in line)


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_declines_says_why(name: str) -> None:
    layers, reason = DECLINED[name]
    model = nn.Sequential(*layers)
    data = [batch((2, 8, 8), 2, 4, torch.float32) for _ in "ab"]
    assert reason in why_not_compiled(model, data)


def test_options_that_it_declines() -> None:
    model, image = build("conv4-small")
    data = [batch(image, 2, 4) for _ in "ab"]
    assert "flat in K" in why_not_compiled(model, data, inner_steps=3, memory="low")
    x = data[0][0].clone().requires_grad_()
    with pytest.raises(ValueError, match="require grad"):
        fastmeta.maml_step(model, (x, data[0][1]), data[1], executor="layered")


@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rates_of_single_elements(first_order: bool) -> None:
    model, image = build("pools-to-one-pixel")
    support, query = batch(image, 3, 4), batch(image, 3, 5)
    rates = {
        name: (0.05 + 0.1 * torch.rand(2, *p.shape)).double().requires_grad_()
        for name, p in model.named_parameters()
    }
    leaves = [*model.parameters(), *rates.values()]
    expected = oracle.maml(
        model, oracle.split(support, query), leaves, steps=2, rate=lambda n, k: rates[n][k],
        first_order=first_order,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, support, query, inner_lr=rates, inner_steps=2, executor="layered",
        first_order=first_order,
    )  # fmt: skip
    assert apart(torch.autograd.grad(out.loss, leaves), expected.gradients) < TOLERANCE


@pytest.mark.parametrize("name", ["no-norm", "strided-mean", "running-norm"])
def test_tasks_of_different_sizes(name: str) -> None:
    """Padded without batch statistics, grouped with them: the real examples count alone."""
    check_ragged(*build(name))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_adapted_models(steps: int) -> None:
    model, image = build("wide")
    support, query = batch(image, 3, 4), batch(image, 3, 5)
    adapted = fastmeta.adapt(model, support, inner_lr=0.1, inner_steps=steps, executor="layered")
    expected = oracle.maml(
        model, oracle.split(support, query), list(model.parameters()), steps=steps,
        rate=lambda *_: 0.1,
    )  # fmt: skip
    outputs = adapted(query[0])
    torch.testing.assert_close(outputs, torch.stack(expected.query_outputs).detach())


def test_wrong_labels_are_refused() -> None:
    model, image = build("conv4-small")
    (x, y), query = batch(image, 2, 4), batch(image, 2, 4)
    with pytest.raises(ValueError, match="support_y"):
        fastmeta.maml_step(model, (x, y + 7), query, executor="layered")


def test_one_number_a_channel_has_no_variance() -> None:
    model = nn.Sequential(Block(1, 4), Block(4, 4, pool=1), *flat(4)).double()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fastmeta.maml_step(model, batch((1, 2, 2), 2, 1), batch((1, 2, 2), 2, 4))


def test_no_gradient_is_asked_for() -> None:
    model, image = build("wide")
    support, query = batch(image, 2, 4), batch(image, 2, 5)
    with torch.no_grad():
        out = fastmeta.maml_step(model, support, query, inner_steps=2, executor="layered")
    expected = oracle.maml(model, oracle.split(support, query), list(model.parameters()), steps=2)
    torch.testing.assert_close(out.task_losses, expected.task_losses)
    assert not out.loss.requires_grad


def test_explain_names_the_executor() -> None:
    model, image = build("conv4-small")
    text = fastmeta.explain(model, batch(image, 2, 4), batch(image, 2, 4))
    assert "executor: layered" in text
    with mock.patch.dict(os.environ, {"FASTMETA_ISA": "baseline"}):
        model, image = build("conv4-small")
        assert "baseline" in fastmeta.explain(model, batch(image, 2, 4), batch(image, 2, 4))
