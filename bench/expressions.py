"""Activations and losses by formula beside those that the kernels know by name, one thread.

python -m bench.expressions [--seconds S]

The network is W1b's, 1-40-40-1 with T = 25, N = Q = 10 and K = 5; a step is loss and meta-gradient.
How times are taken stands in `bench/rounds.py`; `ratio` is by the first row of each table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from bench import cores, rounds

KNEE = 1.0


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    error = (prediction - target).abs()
    return torch.where(error < KNEE, 0.5 * error * error, KNEE * (error - 0.5 * KNEE)).mean()


def quantile(prediction: Tensor, target: Tensor) -> Tensor:
    error = target - prediction
    return torch.maximum(0.3 * error, -0.7 * error).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.mse_loss": F.mse_loss,
    "((p - y) ** 2).mean()": lambda p, y: ((p - y) ** 2).mean(),
    "Huber written out": huber,
    "quantile": quantile,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.tanh": torch.tanh,
    "F.silu": F.silu,
    "x sigmoid(1.7 x)": lambda x: x * torch.sigmoid(1.7 * x),
    "F.mish": F.mish,
    "exp(-x x)": lambda x: torch.exp(-x * x),
    "sin(30 x)": lambda x: torch.sin(30 * x),
}


class Network(nn.Module):
    """1-40-40-1 with a function between the layers."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.second(self.between(self.first(x)))))


def step(
    between: Callable[[Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], str]:
    torch.manual_seed(0)
    model = Network(between)
    sets = [tuple(torch.randn(25, 10, 1) for _ in range(2)) for _ in range(2)]

    def call() -> str:
        out = fastmeta.maml_step(model, *sets, inner_lr=0.001, inner_steps=5, loss_fn=loss)
        out.loss.backward()
        return out.executor

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row")
    seconds = parser.parse_args().seconds
    cores.restrict(1)
    for title, calls in (
        ("loss", {name: step(F.relu, loss) for name, loss in LOSSES.items()}),
        ("activation", {name: step(f, F.mse_loss) for name, f in ACTIVATIONS.items()}),
    ):
        executors = {name: call() for name, call in calls.items()}
        found = {name: timing.ms for name, timing in rounds.times(calls, seconds).items()}
        first = next(iter(found.values()))
        print(f"| {title} | executor | ms | ratio |\n|---|---|---|---|")
        for name, ms in found.items():
            print(f"| `{name}` | {executors[name]} | {ms:.3f} | {ms / first:.2f} |")
        print()


if __name__ == "__main__":
    main()
