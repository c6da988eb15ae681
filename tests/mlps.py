"""Multi-layer perceptrons with every activation and loss that the fused kernels know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, nn.Module] = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "elu": nn.ELU(0.7),
    "softplus": nn.Softplus(beta=2.0, threshold=1.0),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}
LOSSES: dict[str, Any] = {
    "cross_entropy": F.cross_entropy,
    "label_smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "huber": nn.HuberLoss(delta=0.5),
    "smooth_l1": nn.SmoothL1Loss(beta=0.5),
    "l1": F.l1_loss,
}
TAKE_LABELS = ("cross_entropy", "label_smoothing", "ignore_index")


def mlp(*widths: int, activation: nn.Module, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1], bias=bias), activation]
    return nn.Sequential(*layers[:-1]).double()


def examples(tasks: int, count: int, model: nn.Sequential, labels: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(tasks, count, model[0].in_features).double()
    outputs = model[-1].out_features
    if labels:
        return x, torch.randint(outputs, (tasks, count))
    return x, torch.rand(tasks, count, outputs).double()
