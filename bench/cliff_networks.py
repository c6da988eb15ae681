"""Networks that compute what a plain one does, and once fell off a cliff for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import mlp


class Chain(nn.Module):
    """A plain MLP as its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(300, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WithAuxiliaryHead(Chain):
    """With a head that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():  # the data drawn next are the plain network's
            self.auxiliary = nn.Linear(64, 7)


class WithFlag(Chain):
    """With a flag that is off."""

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        features = self.layers[1](self.layers[0](x))
        out = self.layers[2](features)
        if return_features:
            return out, features
        return out


SETTINGS = {"scale": [1.0]}


class Unwatchable(Chain):
    """With a forward that reads what nothing can watch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * SETTINGS["scale"][0])


class CleanChild(Unwatchable):
    """With a forward of its own that does not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def with_dropout() -> nn.Module:
    """Dropout that drops nothing."""
    return nn.Sequential(nn.Linear(300, 64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 3))


class Recurrent(nn.Module):
    """An LSTM over sequences, and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def with_group_norm(network: Any) -> nn.Module:
    """A network's batch norms exchanged for group norms."""
    for i, layer in enumerate(network):
        if isinstance(layer, nn.BatchNorm2d):
            network[i] = nn.GroupNorm(8, layer.num_features)
    return network
