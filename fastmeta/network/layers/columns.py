"""A number a column: `x * w`, `x + b`, with w and b of the last dimension's size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmeta.network.layers.layer import (
    Gradients,
    Layer,
    State,
    Tensors,
    Wanted,
    named,
    plus,
)
from fastmeta.network.layers.product import Product


@dataclass(frozen=True)
class Scale(Product):
    """`x * w`, maybe with `+ b`."""

    weight: str
    bias: str | None = None

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        y, bias = inputs[0] * tensors[self.weight], named(tensors, self.bias)
        return y if bias is None else y + bias

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * _wide(weight, x)

    def to_input(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return gradient * _wide(weight, x)

    def to_weight(self, gradient: Tensor, x: Tensor, weight: Tensor, count: int) -> Tensor:
        found = self.to_bias(gradient * x)
        return found if count == len(found) else found.sum(0, keepdim=True)

    def to_bias(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1, -2).sum(1)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y.add_(_wide(bias, y))


@dataclass(frozen=True)
class Shift(Layer):
    """`x + b`."""

    bias: str
    weight: None = None

    def parameters(self) -> tuple[str, ...]:
        return (self.bias,)

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0] + tensors[self.bias]

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state.kept["x"] = x
        return x + _wide(state.at[self.bias], x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        found: dict[str, Tensor] = {}
        count = wanted.parameters.get(self.bias)
        if count:
            each = gradient.flatten(1, -2).sum(1)
            found[self.bias] = each if count == len(each) else each.sum(0, keepdim=True)
        return (gradient if wanted.inputs[0] else None,), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        x = state.kept["x"]
        bias = named(state.tangents, self.bias)
        total = plus(inputs[0], None if bias is None else _wide(bias, x).expand_as(x))
        assert total is not None
        return total

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        return self.backward(state, wanted, tangent)


def _wide(parameter: Tensor, x: Tensor) -> Tensor:
    """`[S, C]` so that it broadcasts to `[T, N, ..., C]`."""
    return parameter.view(len(parameter), *(1,) * (x.dim() - 2), -1)
