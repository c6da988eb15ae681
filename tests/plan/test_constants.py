"""Constants of losses and activations are arguments of a step: changing them makes no new plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.network.losses.recognition import recognise
from fastmeta.plan import planner

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

Loss = Callable[[Any, Any], Tensor]


def _mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, 4)).double()


def _conv(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), activation(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    ).double()


def _rules(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """A network that the layers' rules compute."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), activation(), nn.Flatten(), nn.Linear(108, 4)
    ).double()


def _data(model: nn.Module, tasks: int = 3) -> list[tuple[Tensor, Tensor]]:
    shape = (3,) if isinstance(model[0], nn.Linear) else (2, 8, 8)  # pyright: ignore
    return [(torch.randn(tasks, n, *shape).double(), torch.randint(4, (tasks, n))) for n in (5, 6)]


def _gradients(model: nn.Module, data: Any, loss: Loss, executor: str) -> list[Tensor]:
    out = fastmeta.maml_step(
        model, *data, inner_lr=0.3, inner_steps=2, loss_fn=loss, executor=executor
    )
    assert executor == "generic" or out.executor != "generic"
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]


def _agrees(model: nn.Module, data: Any, loss: Loss, executor: str = "auto") -> list[Tensor]:
    ours, theirs = (_gradients(model, data, loss, by) for by in (executor, "generic"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return ours


def _smoothed(smoothing: float) -> Loss:
    return lambda p, t: F.cross_entropy(p, t, label_smoothing=smoothing)


def _weighted(weight: Tensor) -> Loss:
    return lambda p, t: F.cross_entropy(p, t, weight=weight)


def _by_attribute() -> Callable[[float], Loss]:
    module = nn.CrossEntropyLoss(label_smoothing=0.1)

    def at(smoothing: float) -> Loss:
        module.label_smoothing = smoothing
        return module

    return at


def _weights(number: float) -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, number], dtype=torch.float64)


CHANGES: dict[str, Callable[[float], Loss]] = {
    "label-smoothing-of-a-module": _by_attribute(),
    "label-smoothing-of-a-partial": lambda s: functools.partial(F.cross_entropy, label_smoothing=s),
    "label-smoothing-in-a-lambda": _smoothed,
    "class-weights-of-a-module": lambda s: nn.CrossEntropyLoss(weight=_weights(s)),
    "class-weights-in-a-lambda": lambda s: _weighted(_weights(s)),
}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one for each plan that is made."""
    made: list[int] = []
    make = planner._read
    monkeypatch.setattr(planner, "_read", lambda *a: made.append(1) or make(*a))
    return made


@pytest.mark.parametrize("make", [_mlp, _conv, _rules], ids=["mlp", "conv", "rules"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_constant_of_the_loss_is_an_argument(
    make: Callable[[], nn.Module], change: Callable[[float], Loss], plans: list[int]
) -> None:
    model = make()
    data, executor = _data(model), "layered" if make is _rules else "auto"
    first = _agrees(model, data, change(0.1), executor)
    made = len(plans)
    for number in (0.2, 0.3):
        after = _agrees(model, data, change(number), executor)
        assert abs(after[0] - first[0]) > 1e-6
    assert len(plans) == made


@pytest.mark.parametrize("make", [_mlp, _conv, _rules], ids=["mlp", "conv", "rules"])
def test_a_slope_is_an_argument(make: Any, plans: list[int]) -> None:
    model = make(functools.partial(nn.LeakyReLU, 0.1))
    data, executor = _data(model), "layered" if make is _rules else "auto"
    (leaky,) = (part for part in model if isinstance(part, nn.LeakyReLU))
    first = _agrees(model, data, F.cross_entropy, executor)
    made = len(plans)
    for slope in (0.2, 0.3):
        leaky.negative_slope = slope
        after = _agrees(model, data, F.cross_entropy, executor)
        assert abs(after[0] - first[0]) > 1e-9
    assert len(plans) == made
    data = [(x[:, :4], y[:, :4]) for x, y in data]  # other sizes, which find the same plan
    leaky.negative_slope = 0.4
    _agrees(model, data, F.cross_entropy, executor)


class ElusByTwoWays(nn.Module):
    """A module that is not called has the name of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8).double(), nn.Linear(8, 4).double()
        self.elu = nn.ELU(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.elu(self.first(x), 0.3))


def test_the_option_of_a_call_is_no_modules() -> None:
    model = ElusByTwoWays()
    data = [(torch.randn(3, n, 3).double(), torch.randint(4, (3, n))) for n in (5, 6)]
    first = _agrees(model, data, F.cross_entropy)
    model.elu.alpha = 2.0
    assert torch.equal(_agrees(model, data, F.cross_entropy)[0], first[0])


def test_a_slope_that_kernels_do_not_take() -> None:
    model = _mlp(functools.partial(nn.LeakyReLU, 0.1))
    data = _data(model)
    _agrees(model, data, F.cross_entropy)
    model[1].negative_slope = -0.1  # pyright: ignore
    out = fastmeta.maml_step(model, *data)
    right = fastmeta.maml_step(model, *data, executor="generic")
    torch.testing.assert_close(out.loss, right.loss, rtol=1e-12, atol=0)


def test_a_constant_that_torch_refuses() -> None:
    model, loss = _mlp(), nn.CrossEntropyLoss(label_smoothing=0.1)
    data = _data(model)
    _agrees(model, data, loss)
    loss.label_smoothing = 1.5
    with pytest.raises(RuntimeError, match="label_smoothing"):
        fastmeta.maml_step(model, *data, loss_fn=loss)


def test_another_number_of_tasks_finds_the_same_plan(plans: list[int]) -> None:
    model = _mlp()
    for tasks in range(1, 40):
        _agrees(model, _data(model, tasks), F.cross_entropy)
    assert len(plans) == 1


def test_an_attribute_that_forward_does_not_read_changes_nothing(plans: list[int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.step = _mlp(), 0

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    model = Net()
    data = _data(model.layers)
    for step in range(4):
        model.step = step  # and one that is new
        setattr(model, f"note{step}", object())
        fastmeta.maml_step(model, *data)
    assert len(plans) == 1


def test_nor_does_one_of_a_layer_of_torchs(plans: list[int]) -> None:
    model = _mlp()
    data = _data(model)
    for step in range(4):
        model.step = model[0].step = step  # pyright: ignore
        fastmeta.maml_step(model, *data)
    assert len(plans) == 1


def test_constants_that_decide_are_no_arguments() -> None:
    def branching(number: float) -> Loss:
        return lambda p, t: (
            F.cross_entropy(p, t) if number > 0.5 else F.cross_entropy(p, t, label_smoothing=number)
        )

    assert str(recognise(branching(0.9))) == "cross_entropy"
    assert str(recognise(branching(0.2))) == "cross_entropy(label_smoothing=0.2)"

    def computing(number: float) -> Loss:
        return lambda p, t: F.cross_entropy(p, t, label_smoothing=number / 2)

    assert str(recognise(computing(0.5))) == "cross_entropy(label_smoothing=0.25)"
    weight = _weights(1)
    assert recognise(lambda p, t: F.cross_entropy(p, t, weight=2 * weight)) is None


ARRAY = np.array([0.5, 1.5])


@dataclasses.dataclass
class _Unhashable:
    scale: float

    def __call__(self, p: Tensor, t: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(p, t)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, t: F.cross_entropy(p, t) * float(ARRAY.sum()),
        lambda p, t, array=ARRAY: F.cross_entropy(p, t) * float(array.sum()),
        (lambda array: lambda p, t: F.cross_entropy(p, t) * float(array.sum()))(ARRAY),
        _Unhashable(2.0),
    ],
    ids=["global-array", "default-array", "closure-array", "unhashable"],
)
def test_losses_that_compare_oddly(loss: Loss) -> None:
    model = _mlp()
    data = _data(model)
    right = fastmeta.maml_step(model, *data, inner_steps=0, executor="generic")
    for _ in range(2):
        out = fastmeta.maml_step(model, *data, inner_steps=0, loss_fn=loss)
        torch.testing.assert_close(out.loss, 2 * right.loss, rtol=1e-12, atol=0)
