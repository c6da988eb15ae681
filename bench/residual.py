"""ResNet-12, the backbone of few-shot learning, narrow and as it is used."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from bench.workloads import Workload


class Residual(nn.Module):
    """A block of ResNet-12: three convolutions beside a projection, then pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(w, outputs, 3, padding=1, bias=False) for w in widths)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(outputs, track_running_stats=False) for _ in range(4)
        )
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        h = F.leaky_relu(self.norms[1](self.convs[1](h)), 0.1)
        h = self.norms[2](self.convs[2](h)) + self.norms[3](self.project(x))
        return F.max_pool2d(F.leaky_relu(h, 0.1), 2)


def resnet12(*filters: int) -> nn.Sequential:
    """Of color images; four widths are usual."""
    blocks = [Residual(*pair) for pair in itertools.pairwise((3, *filters))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters[-1], 5))


def _small() -> nn.Module:
    return resnet12(16, 32, 64, 128)


def _wide() -> nn.Module:
    return resnet12(64, 128, 256, 512)


RESIDUAL = {
    "resnet12": Workload("resnet12", _small, 5, (3, 32, 32), 4, 5, 75, 5),
    "resnet12-84": Workload("resnet12-84", _wide, 5, (3, 84, 84), 2, 5, 15, 2),
}
"""The first is narrow and of small images, the second as in the literature, miniImageNet's size."""
