"""The workloads that every figure is about: second-order MAML."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """A network, a loss and the sizes: T tasks, N support and Q query examples, K inner steps."""

    name: str
    network: Callable[[], nn.Module]
    classes: int | None  # None: regression
    shape: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int
    inner_lr: float = 0.01
    own_loss: Loss | None = None
    """One that no library knows by name, in place of the mean squares."""
    targets: int = 1
    """Numbers a regression target has."""
    rule: str = "descent"
    """The inner loop's: "descent", "momentum" or "Adam" (`bench/rules.py`)."""

    @property
    def loss_fn(self) -> Loss:
        if self.own_loss is not None:
            return self.own_loss
        return F.mse_loss if self.classes is None else F.cross_entropy

    @property
    def of_images(self) -> bool:
        """True where its network is convolutional."""
        return len(self.shape) == 3

    def with_steps(self, steps: int) -> Workload:
        return replace(self, steps=steps)

    def with_tasks(self, tasks: int) -> Workload:
        return replace(self, tasks=tasks)

    def make(
        self, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, Pair, Pair]:
        """The model, and random support and query sets of realistic scale."""
        torch.manual_seed(seed)
        model = self.network().to(dtype)

        def examples(count: int) -> Pair:
            x = torch.randn(self.tasks, count, *self.shape).to(dtype)
            if self.classes is None:
                return x, torch.randn(self.tasks, count, self.targets).to(dtype)
            labels = torch.arange(count).remainder(self.classes)
            return x, labels.expand(self.tasks, count).contiguous()

        return model, examples(self.support), examples(self.query)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(inputs, outputs)] + ([activation()] if i < len(widths) - 2 else [])
    return nn.Sequential(*layers)


class Sine(nn.Module):
    """sin(30 x), the activation of a SIREN (Sitzmann et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren(*widths: int) -> nn.Sequential:
    """Sines between linear layers, initialised as that paper has it."""
    network = mlp(*widths, activation=Sine)
    for i, layer in enumerate(network):
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features
            bound = 1 / inputs if i == 0 else (6 / inputs) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)
    return network


class Skip(nn.Sequential):
    """`x + f(x)`."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def normed_mlp(*widths: int) -> nn.Sequential:
    """Linear layers with layer norms and ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def residual_mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """A layer, one more with the identity beside it, and a last one."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), Skip(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, outputs),
    )  # fmt: skip


LOG_STD = nn.Parameter(torch.linspace(-0.5, 0.0, 6))
"""Learned with the network, where a peer's backward reaches what a loss captures."""


def policy_loss(mean: Tensor, target: Tensor) -> Tensor:
    """A policy gradient of a diagonal Gaussian; targets are actions and the advantage."""
    action, advantage = target[..., :-1], target[..., -1]
    log_std = LOG_STD.to(mean.dtype)
    z = (action - mean) * (-log_std).exp()
    return ((0.5 * z.square() + log_std).sum(-1) * advantage).mean()


def reinforce(mean: Tensor, target: Tensor) -> Tensor:
    """The same of a single action with a fixed deviation."""
    action, advantage = target[..., :-1], target[..., -1]
    return (0.5 * ((action - mean) / 0.3).square().sum(-1) * advantage).mean()


def conv4(channels: int, filters: int, side: int, classes: int) -> nn.Sequential:
    """Four blocks of 3x3 convolution, batch norm, ReLU and max pooling, and a linear head."""
    layers: list[nn.Module] = []
    for inputs in (channels, filters, filters, filters):
        layers += [
            nn.Conv2d(inputs, filters, 3, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side * side, classes))


class StridedConv4(nn.Module):
    """MAML's own Omniglot network: stride-2 convolutions and a spatial mean, no pooling."""

    def __init__(self, classes: int = 5, filters: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, filters, filters, filters):
            layers += [
                nn.Conv2d(inputs, filters, 3, stride=2, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(filters, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def _all() -> list[Workload]:
    sinusoid = Workload("W1", lambda: mlp(1, 40, 40, 1), None, (1,), 25, 10, 10, 1)
    digits = Workload("W2", lambda: mlp(784, 64, 10), 10, (784,), 32, 10, 150, 1)
    omniglot = Workload("W5", lambda: conv4(1, 64, 28, 5), 5, (1, 28, 28), 4, 5, 75, 1)
    strided = Workload("W5s", StridedConv4, 5, (1, 28, 28), 32, 5, 5, 1, 0.4)
    policy = Workload(
        "W8", lambda: mlp(20, 100, 100, 6, activation=nn.Tanh), None, (20,), 20, 200, 200, 1, 0.1,
        policy_loss, 7,
    )  # fmt: skip
    field = Workload("W7", lambda: siren(2, 256, 256, 256, 256, 3), None, (2,), 4, 1024, 1024, 2,
                     targets=3)  # fmt: skip
    small_field = Workload(
        "W7s", lambda: siren(2, 64, 64, 64, 1), None, (2,), 16, 256, 256, 3
    )  # fmt: skip
    normed = Workload("LayerNorm", lambda: normed_mlp(32, 64, 64, 5), 5, (32,), 16, 5, 75, 5)
    few_tasks = {"W1b": (1,), "W3": (1, 4)}
    other_rules = {
        "W1b": ("momentum", "Adam"), "W4": ("momentum", "Adam"),
        "W5": ("momentum",), "W5b": ("momentum",), "W6": ("momentum",),
    }  # fmt: skip
    workloads = [
        sinusoid,
        replace(sinusoid, name="W1b", steps=5),
        replace(sinusoid, name="W1c", steps=5, tasks=1000),
        replace(sinusoid, name="W1r", steps=5, own_loss=reinforce, targets=2),
        digits,
        replace(digits, name="W2b", steps=5),
        Workload("W3", lambda: mlp(784, 128, 128, 10), 10, (784,), 32, 50, 150, 5),
        Workload("W4", lambda: mlp(300, 64, 3), 3, (300,), 4, 15, 45, 5),
        omniglot,
        replace(omniglot, name="W5b", steps=5),
        strided,
        replace(strided, name="W5sq", query=75),
        Workload("W6", lambda: conv4(3, 32, 84, 5), 5, (3, 84, 84), 2, 5, 75, 5),
        field,
        small_field,
        policy,
        replace(policy, name="W8b", steps=3),
        normed,
        replace(normed, name="residual", network=lambda: residual_mlp(32, 64, 5)),
    ]
    return [
        *workloads,
        *(
            replace(workload, name=f"{workload.name} at T={tasks}", tasks=tasks)
            for workload in workloads
            for tasks in few_tasks.get(workload.name, ())
        ),
        *(
            replace(workload, name=f"{workload.name} {rule}", rule=rule)
            for workload in workloads
            for rule in other_rules.get(workload.name, ())
        ),
    ]


WORKLOADS = {workload.name: workload for workload in _all()}
