"""A model that changed after its plan was made is read anew; what can't be seen is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

Change = Callable[[Any], object]


def conv(channels: int = 2) -> nn.Conv2d:
    return nn.Conv2d(channels, 2, 3, padding=1)


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def data(side: int = 8, channels: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, channels, side, side).double(), torch.randint(3, (3, 5))


def agrees_with_the_general_path(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    ours, reference = (
        fastmeta.maml_step(model, batch, batch, executor=executor)
        for executor in ("auto", "generic")
    )
    leaves = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(reference.loss, leaves),
        strict=True,
    )  # fmt: skip
    for ours_of, theirs in pairs:
        assert float((ours_of - theirs).norm()) <= 1e-10 * max(1.0, float(theirs.norm()))


def put(place: int, **values: Any) -> Change:
    return lambda model: [setattr(model[place], name, value) for name, value in values.items()]


def shared() -> nn.Module:
    first, second = conv(), conv()
    return network(first, nn.ReLU(), second, nn.ReLU(), first)


def route_to_another(model: Any) -> None:
    model[4] = model[2]


def tied() -> nn.Module:
    first, second, third = conv(), conv(), conv()
    third.weight = first.weight
    return network(first, nn.ReLU(), second, nn.ReLU(), third)


def tie_to_another(model: Any) -> None:
    model[4].weight = model[2].weight


def odd_norm() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.eps = np.float64(1e-5)
    return network(conv(), norm, nn.ReLU())


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: network(conv(), nn.ReLU()), put(0, stride=(2, 2))),
        (lambda: network(conv(), nn.ReLU()), put(0, padding=(2, 2))),
        (lambda: network(conv(), nn.ReLU()), put(0, dilation=(2, 2))),
        (
            lambda: network(conv(), nn.ReLU(), nn.MaxPool2d((2, 2))),
            put(2, kernel_size=(3, 3), stride=(3, 3)),
        ),
        (odd_norm, put(1, eps=np.float64(0.9))),
        (shared, route_to_another),
        (tied, tie_to_another),
        (lambda: network(conv(), nn.ReLU()), put(1, __class__=nn.Tanh)),
    ],
    ids=["stride", "padding", "dilation", "window", "eps", "module", "weight", "class"],
)
def test_what_changed_is_read_anew(make: Callable[[], nn.Module], change: Change) -> None:
    model, batch = make(), data()
    fastmeta.maml_step(model, batch, batch)
    change(model)
    agrees_with_the_general_path(model, batch)


def test_a_list_that_may_change_unseen_is_left_to_the_general_path() -> None:
    model, batch = network(conv(), nn.ReLU(), nn.MaxPool2d([2, 2])), data()  # pyright: ignore
    assert fastmeta.maml_step(model, batch, batch).executor == "generic"
    model[2].kernel_size[0] = model[2].stride[0] = 3
    agrees_with_the_general_path(model, batch)


def test_what_takes_the_place_of_a_list_is_watched() -> None:
    model, of_another_size = network(conv(), nn.ReLU()), data(10)
    put(0, padding=[2, 2])(model)
    assert fastmeta.maml_step(model, data(), data()).executor == "generic"
    put(0, padding=(1, 1))(model)
    step = fastmeta.maml_step(model, of_another_size, of_another_size)
    assert step.executor.startswith("layered")
    put(0, padding=2)(model)
    agrees_with_the_general_path(model, of_another_size)


@pytest.mark.parametrize(
    ("at", "name", "first", "second"),
    [
        (0, "padding", (np.int64(1),) * 2, (2, 2)),
        (0, "stride", np.int64(1), np.int64(2)),
        (1, "eps", np.float32(1e-5), np.float32(0.9)),
        (1, "eps", torch.tensor(1e-5), torch.tensor(0.9)),
    ],
)
def test_numbers_that_are_not_pythons_own(at: int, name: str, first: Any, second: Any) -> None:
    model, batch = network(conv(), nn.BatchNorm2d(2), nn.ReLU()), data()
    for value in (first, second, first):
        put(at, **{name: value})(model)
        agrees_with_the_general_path(model, batch)


def test_numbers_that_no_code_reads_may_be_numpys() -> None:
    widths = np.prod((4, 2)), np.int64(4)
    model = nn.Sequential(
        nn.Linear(*widths), nn.BatchNorm1d(widths[1], momentum=np.float32(0.1)), nn.Tanh(),
        nn.Dropout(np.float32(0.5)).eval(), nn.Linear(4, 3),
    )  # fmt: skip
    batch = torch.randn(3, 5, 8), torch.randint(3, (3, 5))
    assert fastmeta.maml_step(model, batch, batch).executor.startswith("fused")


def test_lists_at_two_places_are_told_apart() -> None:
    pool: Any = nn.AvgPool2d(4, stride=(2, 2), padding=(2, 2))
    model, batch = network(conv(), pool, nn.ReLU()), data()
    for name in ("padding", "stride"):
        pool.stride = pool.padding = (2, 2)
        setattr(pool, name, [2, 2])
        assert f"has a list, {name}" in fastmeta.explain(model, batch, batch)


def test_a_method_of_torchs_that_was_replaced_hides_what_a_layer_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = network(conv(), nn.ReLU()), data()
    torchs = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: torchs(self, *args))
    for value in ((1, 1), (2, 2), [2, 2], [1, 1]):
        model[0].dilation = value
        agrees_with_the_general_path(model, batch)


def test_a_function_under_torchs_layers_that_was_replaced_is_not_left_to_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = network(conv(), nn.BatchNorm2d(2).eval(), nn.ReLU()), data()
    norm: Any = model[1]
    norm.num_batches_tracked += 1
    torchs = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *args, **kwargs: 2 * torchs(*args, **kwargs))
    for mean in (100.0, 0.0):  # at the first every ReLU is 0, whatever the factor
        norm.running_mean = torch.full((2,), mean).double()
        agrees_with_the_general_path(model, batch)


@pytest.mark.parametrize("name", ["stride", "dilation"])
@pytest.mark.parametrize("value", [1, (2,), (1, 2)])
def test_sizes_of_a_convolution_as_torch_takes_them(name: str, value: Any) -> None:
    model = network(conv(), nn.ReLU())
    setattr(model[0], name, value)
    batch = data()
    assert fastmeta.maml_step(model, batch, batch).executor.startswith("layered")
    agrees_with_the_general_path(model, batch)


class Residual(nn.Module):
    """The activation changes what the sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(1), conv()
        self.activation, self.head = nn.ReLU(inplace=True), nn.Linear(2 * 81, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + self.second(self.activation(x))).flatten(1))


def test_what_changes_in_place_what_others_read_is_left_to_the_general_path() -> None:
    model = Residual().double()
    with torch.no_grad():  # at first nothing is negative there
        model.first.weight.abs_()
        model.first.bias.fill_(0.1)
    x, y = data(9, 1)
    fastmeta.maml_step(model, (x.abs(), y), (x.abs(), y))
    agrees_with_the_general_path(model, (x, y))


def test_a_norm_at_two_places_keeps_its_statistics() -> None:
    norm = nn.BatchNorm2d(2)
    model = network(conv(), norm, nn.ReLU(), conv(), norm)
    mean, before, batch = norm.running_mean, norm.running_mean.clone(), data()
    for executor in ("auto", "generic"):
        fastmeta.maml_step(model, batch, batch, executor=executor)
    assert norm.running_mean is mean
    assert torch.equal(mean, before)
    assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("groups", [None, 2])
def test_a_task_without_a_label_that_counts_goes_on(groups: int | None) -> None:
    norm = nn.BatchNorm2d(2) if groups is None else nn.GroupNorm(groups, 2)
    model = network(conv(), norm, nn.ReLU())
    x, y = data()
    ignored = y.clone()
    ignored[2] = -100
    steps = [
        fastmeta.maml_step(model, (x, ignored), (x, y), executor=executor)
        for executor in ("layered", "generic")
    ]
    leaves = list(model.parameters())
    ours, theirs = (torch.autograd.grad(step.loss, leaves) for step in steps)
    assert torch.allclose(steps[0].task_losses, steps[1].task_losses, rtol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_rules_look_at_labels_too() -> None:
    model, (x, y) = network(conv(), nn.GroupNorm(2, 2), nn.ReLU()), data()
    assert fastmeta.maml_step(model, (x, y), (x, y)).executor == "layered-torch"
    wrong = y.clone()
    wrong[0, 0] = 3
    with pytest.raises(ValueError, match="query_y: label 3"):
        fastmeta.maml_step(model, (x, y), (x, wrong))
