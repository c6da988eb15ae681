"""Warnings where a model that kernels are made for is left to the general path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")


@pytest.fixture(autouse=True)
def _warned():
    fastmeta.set_cliff_warnings(True)
    yield
    fastmeta.set_cliff_warnings(False)


class Doubled(nn.Module):
    """An own block in an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 4)
        self.settings = {"scale": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.leaky_relu(self.first(x), self.settings["scale"]))


def _mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), *between, nn.Linear(8, 4))


def _image(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *between, nn.Flatten(), nn.Linear(144, 4))


def _data(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    shape = (2, 8, 8) if any(isinstance(part, nn.Conv2d) for part in model.modules()) else (3,)
    return [(torch.randn(3, n, *shape), torch.randint(4, (3, n))) for n in (5, 6)]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "layer": (lambda: _mlp(nn.PReLU()), {}, r"layer '1' \(PReLU\) is none that the kernels know"),
    "dropout": (lambda: _mlp(nn.AlphaDropout(0.5)), {}, "draw no random numbers"),
    "own-code": (Doubled, {}, "settings"),
    "image-layer": (lambda: _image(nn.PReLU()), {}, r"layer '1' \(PReLU\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_warns_once_with_the_cause(case: str) -> None:
    make, options, cause = CASES[case]
    model = make()
    data = _data(model)
    with pytest.warns(UserWarning, match=cause) as caught:
        out = fastmeta.maml_step(model, *data, **options)
    # With layers that have no rules of their own, the fastest is found by measuring.
    assert out.executor in ("generic", "layered-torch")
    assert caught[0].filename == __file__
    other = [(x[:, :4], y[:, :4]) for x, y in data]  # which is planned anew
    fastmeta.maml_step(model, *other, **options)  # warnings are errors


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (_mlp(nn.ReLU()), {}),
        (_mlp(nn.LayerNorm(8)), {}),
        (_mlp(), {"loss_fn": lambda p, t: p.square().mean()}),
        (_image(nn.ReLU()), {}),
        (_mlp(nn.PReLU()), {"executor": "generic"}),
        (_mlp(nn.PReLU()), {"memory": "low"}),
        (
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3), nn.Flatten()),
            {},
        ),
    ],
    ids=["mlp", "norm", "loss", "image", "asked-for", "low-memory", "other-kind"],
)
def test_is_silent_otherwise(model: nn.Module, options: dict[str, Any]) -> None:
    fastmeta.maml_step(model, *_data(model), **options)


def test_can_be_turned_off() -> None:
    fastmeta.set_cliff_warnings(False)
    model = _mlp(nn.PReLU())
    fastmeta.maml_step(model, *_data(model))
    fastmeta.set_cliff_warnings(True)
    with pytest.warns(UserWarning, match="several times slower than compiled"):
        fastmeta.maml_step(model, *[(x[:, :4], y[:, :4]) for x, y in _data(model)])
