"""What layers without parameters share that are linear in their input: pooling by means, shapes."""

from __future__ import annotations

from torch import Tensor

from fastmeta.network.layers.layer import Gradients, Layer, State, Wanted


class LinearMap(Layer):
    """`y = A x`: the tangent is A too, and both backward rules its transpose."""

    def map(self, x: Tensor) -> Tensor:
        """`A x`."""
        raise NotImplementedError

    def transpose(self, gradient: Tensor, x: Tensor) -> Tensor:
        """`Aᵀ gradient`, in the shape of `x`."""
        raise NotImplementedError

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state.kept["x"] = x
        return self.map(x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        return (self.transpose(gradient, state.kept["x"]) if wanted.inputs[0] else None,), {}

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        assert rx is not None
        return self.map(rx)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        return self.backward(state, wanted, tangent)
