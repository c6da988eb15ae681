"""Networks with parts that have no rules of their own, and data for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class Attention(nn.Module):
    """Pre-norm attention, its sum and the last element of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        z = self.norm(h)
        h = h + self.attention(z, z, z, need_weights=False)[0]
        return self.head(h[:, -1])


class Functions(nn.Module):
    """Functions, methods, arithmetic with parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(10, CLASSES)
        self.context = nn.Parameter(torch.randn(2))
        self.log_scale = nn.Parameter(torch.randn(CLASSES))
        self.register_buffer("frequencies", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.first(x)) * self.frequencies
        h = torch.cat([h, self.context.expand(x.shape[0], -1)], 1)
        y = self.second(h * 2 + h.exp().clamp(max=3.0))
        return y * self.log_scale.exp()


class Heads(nn.Module):
    """Attention written out, between known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(6, 24), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm1d(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, 8)
        return self.norm(self.out(y).mean(1))


class Centred(nn.Module):
    """A user's own module with a loop in its Python; what it computes mixes examples."""

    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x - torch.tanh(x).mean(0, keepdim=True)
        return x


class Recurrent(nn.Module):
    """What `vmap` has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).flatten(1))


def prelu() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.PReLU(8), nn.LayerNorm(8), nn.Linear(8, 5), nn.BatchNorm1d(5),
        nn.PReLU(), nn.Linear(5, CLASSES),
    )  # fmt: skip


def threshold() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Threshold(-0.1, 0.2, inplace=True), nn.Flatten(),
        nn.Linear(36, CLASSES),
    )  # fmt: skip


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Flatten(), nn.Linear(32, CLASSES))


def centred() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Centred(), nn.Linear(8, CLASSES))


@dataclass(frozen=True)
class Case:
    """A network with the shape of an example; None where these are numbers of a vocabulary."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None

    def inputs(self, *sizes: int) -> Tensor:
        if self.shape is None:
            return torch.randint(9, (*sizes, 4))
        return torch.randn(*sizes, *self.shape, dtype=torch.float64)

    def data(self, tasks: int = 3, sizes: tuple[int, int] = (4, 5)) -> list[tuple[Tensor, Tensor]]:
        return [(self.inputs(tasks, n), torch.randint(CLASSES, (tasks, n))) for n in sizes]


CASES = {
    "attention": Case(Attention, (4, 6)),
    "functions": Case(Functions, (6,)),
    "heads": Case(Heads, (4, 6)),
    "prelu": Case(prelu, (6,)),
    "threshold": Case(threshold, (2, 5, 5)),
    "transformer": Case(transformer, (4, 6)),
    "own-module": Case(centred, (6,)),
    "recurrent": Case(Recurrent, (4, 6)),
    "embedded": Case(Embedded, None),
}
