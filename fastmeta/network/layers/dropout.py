"""Dropout: each pass draws a mask of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.layer import Layer, Tensors


@dataclass(frozen=True)
class Dropout(Layer):
    """`F.dropout` in training, of a share p in (0, 1).

    It has no rules: an executor that takes it draws the masks, in the order in which plain autograd
    does.
    """

    p: float

    @property
    def mixes_examples(self) -> bool:
        """What an example draws depends on its place among the others."""
        return True

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return F.dropout(inputs[0], self.p, training=True)

    def draw(self, mask: Tensor) -> None:
        """Fill a pass's mask `[N, ...]` with ones and zeros, as `F.dropout` does."""
        mask.bernoulli_(1 - self.p)
