"""The sum of two values of one shape: a residual connection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted, plus


@dataclass(frozen=True)
class Add(Layer):
    """`x + y`."""

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        return tuple(gradient if want else None for want in wanted.inputs), {}

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        total = plus(*inputs)
        assert total is not None
        return total

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        return self.backward(state, wanted, tangent)
