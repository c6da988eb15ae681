"""ANIL, where only the head adapts: the general path against a loop that keeps the features.

Processor time of one thread, so that what else the machine does counts for less.

python -m bench.anil
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta
from bench import measure
from fastmeta.executors.generic import forms

Pair = tuple[Tensor, Tensor]
RATE, WAYS = 0.1, 5
RIVAL, BEFORE, AFTER = "loop on kept features", "body at every pass", "features kept"


class Headed(nn.Module):
    """A body over `[N, ...]`, and a linear head on its features."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, WAYS)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Recurrent(Headed):
    """An LSTM over `[N, L, D]`; its last state is read."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(32, 64, batch_first=True), 64)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)[1][0][-1]


class Attending(Headed):
    """An embedding with learned positions, and two encoder layers, over `[N, L]` tokens."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        super().__init__(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 64)
        self.embedding = nn.Embedding(100, 64)
        self.positions = nn.Parameter(0.1 * torch.randn(16, 64))

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.embedding(x) + self.positions).mean(1)


def group_norm() -> Headed:
    """Four blocks of convolution, group norm, ReLU and pooling, over `[N, 1, 28, 28]`."""
    layers: list[nn.Module] = []
    for inputs in (1, 32, 32, 32):
        layers += [nn.Conv2d(inputs, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return Headed(nn.Sequential(*layers, nn.Flatten()), 32)


@dataclass(frozen=True)
class Case:
    """A network, and what its inputs are."""

    network: Callable[[], Headed]
    inputs: Callable[[int, int], Tensor]


CASES = {
    "LSTM 32-64, 16 long": Case(Recurrent, lambda t, n: torch.randn(t, n, 16, 32)),
    "encoder 64, 2 layers, 16 long": Case(Attending, lambda t, n: torch.randint(100, (t, n, 16))),
    "conv4 of 32, group norm": Case(group_norm, lambda t, n: torch.randn(t, n, 1, 28, 28)),
}  # fmt: skip


def rival(model: Headed, support: Pair, query: Pair, steps: int) -> Tensor:
    """The body once a task and set, the inner loop on the head, a backward after every task."""
    total = torch.zeros(())
    tasks = len(support[0])
    for task in range(tasks):
        near, far = model.features(support[0][task]), model.features(query[0][task])
        phi: dict[str, Tensor] = dict(model.head.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model.head, phi, (near,)), support[1][task])
            found = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {
                name: p.sub(g, alpha=RATE) for (name, p), g in zip(phi.items(), found, strict=True)
            }
        loss = F.cross_entropy(functional_call(model.head, phi, (far,)), query[1][task]) / tasks
        loss.backward()
        total += loss.detach()
    return total


def step(model: Headed, support: Pair, query: Pair, steps: int) -> Tensor:
    """The general path's step."""
    out = fastmeta.maml_step(
        model, support, query, inner_lr=RATE, inner_steps=steps, adapt="head", executor="generic"
    )
    out.loss.backward()
    return out.loss.detach()


def contenders(
    case: Case, tasks: int, steps: int, dtype: torch.dtype
) -> tuple[Headed, dict[str, Callable[[], Tensor]]]:
    """The network, and every way to compute its step."""
    torch.manual_seed(0)
    model = case.network().to(dtype)

    def examples(count: int) -> Pair:
        x = case.inputs(tasks, count)
        y = torch.arange(count).remainder(WAYS).expand(tasks, count)
        return x.to(dtype) if x.is_floating_point() else x, y

    data = examples(WAYS), examples(3 * WAYS)
    step(model, *data, steps)  # planned with features kept
    model.zero_grad()

    def before() -> Tensor:
        with mock.patch.object(forms, "Body", side_effect=RuntimeError):
            return step(model, *data, steps)

    def by_hand() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            return rival(model, *data, steps)

    return model, {RIVAL: by_hand, BEFORE: before, AFTER: lambda: step(model, *data, steps)}


def check(case: Case) -> None:
    """Refuses to time what does not agree."""
    model, ways = contenders(case, 2, 3, torch.float64)
    expected: list[Tensor] = []
    for name, way in ways.items():
        model.zero_grad()
        way()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            if not torch.allclose(a, b, rtol=1e-9, atol=1e-12):
                raise SystemExit(f"{name} disagrees; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--tasks", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, T={args.tasks}, N={WAYS}, Q={3 * WAYS}")
    names = (RIVAL, BEFORE, AFTER)
    print("| body, K | " + " | ".join(f"{name}, ms" for name in names) + " | before | after |")
    print("|---" * 6 + "|")
    for label, case in CASES.items():
        check(case)
        for steps in (1, 5, 10):
            _, ways = contenders(case, args.tasks, steps, torch.float32)
            row = measure.interleaved(ways, args.seconds, clock=time.process_time)
            cells = [f"{row[name]:.1f}" for name in names]
            ratios = [f"{row[name] / row[RIVAL]:.2f}" for name in (BEFORE, AFTER)]
            print(f"| {label}, {steps} | " + " | ".join((*cells, *ratios)) + " |", flush=True)


if __name__ == "__main__":
    main()
