"""`x Wᵀ + b`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.layer import Tensors, named
from fastmeta.network.layers.product import Product


@dataclass(frozen=True)
class Linear(Product):
    """`x Wᵀ + b` over the last dimension."""

    weight: str
    bias: str | None

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return F.linear(inputs[0], tensors[self.weight], named(tensors, self.bias))

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 2 * output.numel() * tensors[self.weight].shape[1]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        if len(weight) == 1:
            return x @ weight[0].T
        rows = x.flatten(1, -2)  # [T, R, in]
        return torch.bmm(rows, weight.mT).view(*x.shape[:-1], weight.shape[1])

    def to_input(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        if len(weight) == 1:
            return gradient @ weight[0]
        return torch.bmm(gradient.flatten(1, -2), weight).view_as(x)

    def to_weight(self, gradient: Tensor, x: Tensor, weight: Tensor, count: int) -> Tensor:
        end = 0 if count == 1 else 1  # Of the sum, all tasks' rows are those of one product.
        rows, inputs = gradient.flatten(end, -2), x.flatten(end, -2)
        return rows.mT @ inputs if end else (rows.T @ inputs).unsqueeze(0)

    def to_bias(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1, -2).sum(1)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y.add_(bias.view(len(bias), *(1,) * (y.dim() - 2), -1))
