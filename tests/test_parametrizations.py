"""Parametrized models, and torch's cache of what their parametrizations compute."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastmeta


def examples() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 3).double(), torch.randint(2, (3, 4))


def parametrized() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize(
    "call",
    [
        fastmeta.maml_step,
        fastmeta.explain,
        lambda model, support, query: fastmeta.adapt(model, support),
        lambda model, support, query: fastmeta.MAML(model)(support, query),
    ],
    ids=["maml_step", "explain", "adapt", "MAML"],
)
def test_cached_parametrizations_would_not_adapt(call: Any) -> None:
    model = parametrized()
    with (
        parametrize.cached(),
        pytest.raises(RuntimeError, match=r"parametrize\.cached\(\) is on"),
    ):
        call(model, examples(), examples())
    call(model, examples(), examples())


def test_adapted_tasks_are_not_called_from_the_cache_either() -> None:
    adapted, x = fastmeta.adapt(parametrized(), examples()), torch.randn(3, 5, 3).double()
    expected = adapted(x)
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrize\.cached\(\) is on"):
        adapted(x)
    with parametrize.cached():
        torch.testing.assert_close(adapted[1](x[1]), expected[1])


def test_a_cache_is_no_concern_of_a_model_without_parametrizations() -> None:
    model, tasks = nn.Linear(3, 2).double(), (examples(), examples())
    expected = fastmeta.maml_step(model, *tasks).loss
    with parametrize.cached():
        assert torch.equal(fastmeta.maml_step(model, *tasks).loss, expected)


class Caches(nn.Module):
    """Caches within its forward, which serves one pass alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def test_a_cache_within_a_forward() -> None:
    model, sets = Caches().double(), (examples(), examples())
    out = fastmeta.maml_step(model, *sets, inner_steps=2)
    out.loss.backward()
    leaves = list(model.parameters())
    expected = oracle.maml(model, oracle.split(*sets), leaves, steps=2)
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    torch.testing.assert_close([p.grad for p in leaves], expected.gradients)
