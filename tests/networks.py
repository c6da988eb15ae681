"""Networks of many kinds, each with a maker of inputs and targets and the loss it is trained by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A kind of network; `forms` are the forms of the general path that can serve it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any] = field(default=lambda t, n: torch.randn(t, n, 5))
    classes: int | None = 3
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    forms: tuple[str, ...] = ("vmap", "loop", "sweep")

    def loss(self) -> Callable[[Any, Any], Tensor]:
        if self.loss_fn is not None:
            return self.loss_fn
        return F.mse_loss if self.classes is None else F.cross_entropy

    def targets(self, tasks: int, count: int) -> Tensor:
        if self.classes is None:
            return torch.randn(tasks, count, 1)
        return torch.randint(self.classes, (tasks, count))

    def data(self, tasks: int, count: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
        x, y = self.inputs(tasks, count), self.targets(tasks, count)
        return _to(x, dtype), _to(y, dtype)


def _to(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _to(value, dtype) for key, value in tree.items()}
    return tuple(_to(value, dtype) for value in tree)


class Residual(nn.Module):
    """A residual MLP written as its own module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.middle(h)))


class ResidualConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.norm(self.stem(x)))
        return self.head((h + self.block(h)).mean(dim=(2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block over a sequence of features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 4)).movedim(-3, 0)
        mixed = F.scaled_dot_product_attention(*(t.transpose(-2, -3) for t in (q, k, v)))
        return self.head((h + mixed.transpose(-2, -3).flatten(-2)).mean(-2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Cells(nn.Module):
    """Recurrence written out over `nn.GRUCell`."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


class Tied(nn.Module):
    """An autoencoder-like pair of layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 5), nn.Linear(5, 5)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.decode(torch.tanh(self.encode(x)))))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Buffers(nn.Module):
    """A constant buffer, and a counter that every pass writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 5))
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.detach().mean(0))
        return torch.tanh(self.layer(x * self.scale)).square()


class Embedded(nn.Module):
    """Tokens with a mask, given as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1)
        pooled = (self.embedding(input_ids) * mask).sum(-2) / mask.sum(-2).clamp_min(1)
        return self.head(torch.tanh(pooled))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(3, 4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x, z)))


class TwoOutputs(nn.Module):
    """A dict of predictions, which only a loss of one's own takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"logits": self.one(h), "extra": self.two(h)}


def two_output_loss(prediction: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(prediction["logits"], target) + prediction["extra"].square().mean()


class Branching(nn.Module):
    """Control flow on the data: no batching rule can serve it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.left(x) if x.sum().item() > 0 else self.right(x) * 2).square()


class Scalar(nn.Module):
    """0-d and 1-d parameters of one's own, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.zeros(5))
        self.unread = nn.Parameter(torch.ones(2))
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sin(self.gain * x + self.shift))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point, self.depth = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=4, stride=2)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.depth(F.silu(self.point(x))))
        return self.head(h.view(h.size(0), -1))


def _mlp(*activations: nn.Module, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 5
    for activation in activations:
        layers += [nn.Linear(width, 7, bias=bias), activation]
        width = 7
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias))


def _with_statistics(model: nn.Module) -> nn.Module:
    """Batch norm in `eval()` by running statistics that were written."""
    model(torch.randn(16, 5))
    return model.eval()


def _weight_norm() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


def _affine(model: nn.Module) -> nn.Module:
    """Norm layers whose scale and shift are not at their start."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def images(side: int, channels: int = 1) -> Callable[[int, int], Tensor]:
    return lambda t, n: torch.randn(t, n, channels, side, side)


def sequence(length: int, width: int) -> Callable[[int, int], Tensor]:
    return lambda t, n: torch.randn(t, n, length, width)


def tokens(t: int, n: int) -> dict[str, Tensor]:
    ids = torch.randint(11, (t, n, 4))
    return {"input_ids": ids, "attention_mask": (torch.rand(t, n, 4) > 0.3).float()}


def _conv4() -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (1, 4, 4):
        layers += [
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3))


LOOPS = ("loop", "sweep")
ALL = ("vmap", "loop", "sweep", "fused")

CASES = [
    Case("linear", lambda: nn.Linear(5, 3), forms=ALL),
    Case("relu", lambda: _mlp(nn.ReLU(), nn.ReLU()), forms=ALL),
    Case("tanh-no-bias", lambda: _mlp(nn.Tanh(), bias=False), forms=ALL),
    Case("smooth-mix", lambda: _mlp(nn.GELU(), nn.SiLU(), nn.ELU(), nn.Softplus()), forms=ALL),
    Case("leaky-sigmoid", lambda: _mlp(nn.LeakyReLU(0.2), nn.Sigmoid()), forms=ALL),
    Case("prelu", lambda: _mlp(nn.PReLU(), nn.PReLU(7))),
    Case("regression", lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1)),
         classes=None, forms=ALL),
    Case("batch-norm", lambda: _affine(nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))), forms=ALL),
    Case("batch-norm-plain", lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False, track_running_stats=False), nn.Tanh(),
        nn.Linear(7, 3)), forms=ALL),
    Case("batch-norm-eval", lambda: _with_statistics(_affine(nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)))), forms=ALL),
    Case("layer-norm", lambda: nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))),
    Case("group-norm", lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
        images(5)),
    Case("instance-norm", lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Flatten(),
        nn.Linear(36, 3)), images(5)),
    Case("conv4-pooled", lambda: _affine(_conv4()), images(9)),
    Case("conv-average", lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), images(7, 2)),
    Case("conv1d", lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), sequence(3, 5)),
    Case("conv-transpose", lambda: nn.Sequential(
        nn.ConvTranspose2d(1, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(108, 3)),
        images(3)),
    Case("depthwise", Depthwise, images(9)),
    Case("residual", Residual),
    Case("residual-conv", lambda: _affine(ResidualConv()), images(5)),
    Case("attention", Attention, sequence(4, 3)),
    Case("transformer-encoder", Encoder, sequence(3, 6)),
    Case("lstm", lambda: Recurrent(nn.LSTM), sequence(4, 3), forms=LOOPS),
    Case("gru", lambda: Recurrent(nn.GRU), sequence(4, 3), forms=LOOPS),
    Case("gru-cells", Cells, sequence(3, 3)),
    Case("tied", Tied),
    Case("frozen", Frozen, forms=ALL),
    Case("buffers", Buffers),
    Case("weight-norm", _weight_norm, forms=LOOPS),
    Case("embedding-dict", Embedded, tokens),
    Case("two-inputs", TwoInputs, lambda t, n: (torch.randn(t, n, 3), torch.randn(t, n, 4)),
        forms=LOOPS),
    Case("two-outputs", TwoOutputs, loss_fn=two_output_loss),
    Case("branching", Branching, forms=LOOPS),
    Case("scalar-parameters", Scalar),
]  # fmt: skip
