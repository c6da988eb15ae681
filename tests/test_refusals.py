"""Models and options that torch itself complains of late, or not at all, are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

CALLS = pytest.mark.parametrize(
    "call",
    [
        fastmeta.maml_step,
        fastmeta.explain,
        lambda model, support, query, **options: fastmeta.adapt(model, support, **options),
        lambda model, support, query, **options: fastmeta.MAML(model, **options)(support, query),
    ],
    ids=["maml_step", "explain", "adapt", "MAML"],
)


def examples() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 3), torch.randint(2, (3, 4))


class Abstract(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError("another day")


@CALLS
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.MSELoss, "loss_fn: the class MSELoss, not an instance of it; write nn.MSELoss()"),
        (Abstract, "loss_fn: the class Abstract, not an instance of it; write Abstract(...)"),
    ],
)
def test_a_class_is_no_loss(call: Any, loss_fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(nn.Linear(3, 2), examples(), examples(), loss_fn=loss_fn)


@CALLS
def test_a_model_on_the_meta_device(call: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.Linear(4, 2))
    for device in ("meta", "cpu"):
        sets = [tuple(part.to(device) for part in examples()) for _ in "sq"]
        with pytest.raises(ValueError, match=r"meta device.*model\.to_empty"):
            call(model, *sets)


@CALLS
@pytest.mark.parametrize(
    "adapt",
    [lambda name: True, lambda: True, lambda name, parameter, other: True],
    ids=["one", "none", "three"],
)
def test_a_predicate_of_other_arguments(call: Any, adapt: Any) -> None:
    with pytest.raises(TypeError, match=r"adapt: the predicate .*adapt\(name, parameter\)"):
        call(nn.Linear(3, 2), examples(), examples(), adapt=adapt)


def test_an_error_within_a_predicate_is_its_own() -> None:
    with pytest.raises(TypeError, match="can only concatenate"):
        fastmeta.maml_step(
            nn.Linear(3, 2), examples(), examples(), adapt=lambda name, parameter: name + 1
        )


@CALLS
@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("named", [False, True])
def test_a_rate_that_is_none(call: Any, rate: float, named: bool) -> None:
    rates = {"weight": 0.1, "bias": rate} if named else rate
    label = "inner_lr['bias']" if named else "inner_lr"
    with pytest.raises(ValueError, match=re.escape(f"{label}: {rate}; it must not be negative")):
        call(nn.Linear(3, 2), examples(), examples(), inner_lr=rates)


def test_a_learned_rate_starts_at_one_that_is() -> None:
    with pytest.raises(ValueError, match=r"inner_lr: -0\.1; it must not be negative"):
        fastmeta.MAML(nn.Linear(3, 2), inner_lr=-0.1, learn_inner_lr="layer")


def test_a_learned_rate_may_turn_negative() -> None:
    rate = torch.tensor(-0.1, requires_grad=True)
    fastmeta.maml_step(nn.Linear(3, 2), examples(), examples(), inner_lr=rate).loss.backward()
    assert rate.grad is not None
    assert rate.grad.isfinite()


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (3, 4, 5)), torch.randint(2, (3, 4))


@pytest.mark.parametrize(("mode", "instead"), [("sum", "sum"), ("mean", "mean"), ("max", "amax")])
def test_an_embedding_bag_has_no_second_derivative(mode: str, instead: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 4, mode=mode), nn.Linear(4, 2))
    sets = _tokens(), _tokens()
    named = rf"model: 0 = EmbeddingBag\(7, 4, .*use nn\.Embedding and \.{instead}\(-2\)"
    with pytest.raises(NotImplementedError, match=named):
        fastmeta.maml_step(model, *sets)
    for options in ({"first_order": True}, {"adapt": "1"}):
        fastmeta.maml_step(model, *sets, **options).loss.backward()

    class Instead(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](getattr(self[0](x), instead)(-2))

    fastmeta.maml_step(Instead(nn.Embedding(7, 4), nn.Linear(4, 2)), *sets).loss.backward()


def test_a_bag_called_by_the_forward_itself() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.embedding_bag(x, self.weight)

    with pytest.raises(NotImplementedError, match=r"no second derivative.*first_order=True"):
        fastmeta.maml_step(Bag(), _tokens(), _tokens())


def test_what_a_model_has_not_implemented_is_its_own() -> None:
    with pytest.raises(NotImplementedError, match=r"^another day$"):
        fastmeta.maml_step(Abstract(3, 2), examples(), examples())
