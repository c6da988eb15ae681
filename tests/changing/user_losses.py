"""A user's module: losses, each of which reads something in a way of its own.

Loaded afresh for every program of changes, so that what a program does to it ends with it.
"""

import torch.nn.functional as F
from torch import nn

SMOOTHING = 0.1


def smoothed(prediction, target):
    return F.cross_entropy(prediction, target, label_smoothing=SMOOTHING)


def loss_by_global(prediction, target):
    return F.cross_entropy(prediction, target, label_smoothing=SMOOTHING)


def loss_by_helper(prediction, target):
    return smoothed(prediction, target)


def loss_by_default(prediction, target, smoothing=0.1):
    return F.cross_entropy(prediction, target, label_smoothing=smoothing)


def loss_by_keyword_default(prediction, target, *, smoothing=0.1):
    return F.cross_entropy(prediction, target, label_smoothing=smoothing)


def loss_by_cell(smoothing):
    return lambda prediction, target: F.cross_entropy(prediction, target, label_smoothing=smoothing)


def loss_by_weight(weight):
    return lambda prediction, target: F.cross_entropy(prediction, target, weight=weight)


def loss_by_list(prediction, target, settings=[0.1]):  # noqa: B006
    return F.cross_entropy(prediction, target, label_smoothing=settings[0])


class ScaledLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, prediction, target):
        return self.scale * F.cross_entropy(prediction, target)


class Smoothing:
    """A loss that is an object's method."""

    def __init__(self):
        self.smoothing = 0.1

    def loss(self, prediction, target):
        return F.cross_entropy(prediction, target, label_smoothing=self.smoothing)
