"""Elementwise functions of the user's own: an expression of one value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fastmeta.network.expressions.derivatives import jet
from fastmeta.network.expressions.expression import Expression, evaluate, in_order, variable
from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted

ENTRY = variable(("entry",))
"""The input of an elementwise function."""


@dataclass(frozen=True)
class Elementwise(Layer):
    """A function of each number by itself; the derivatives are those of its expression.

    With z its input: `dz = f'(z) dy`, `ry = f'(z) rz`, `rdz = f'(z) rdy + f''(z) rz dy`.
    """

    expression: Expression

    @cached_property
    def derivatives(self) -> tuple[Expression, Expression]:
        """The first and the second."""
        _, slope, curvature = jet(self.expression, ENTRY)
        return slope, curvature

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        (z,) = inputs
        (value,) = evaluate([self.expression], {ENTRY.value: z}, z)
        return value

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return len(in_order([self.expression])) * output.numel()

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (z,) = inputs
        state.kept["z"] = z
        return self.reference({}, z)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        if not wanted.inputs[0]:
            return (None,), {}
        z = state.kept["z"]
        slope, curvature = evaluate(self.derivatives, {ENTRY.value: z}, z)
        state.kept.update(slope=slope, bend=curvature * gradient)
        return (slope * gradient,), {}

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rz,) = inputs
        assert rz is not None
        state.kept["rz"] = rz
        return self._slope(state) * rz

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        if not wanted.inputs[0]:
            return (None,), {}
        kept = state.kept
        rdz = kept["slope"] * tangent
        return (rdz + kept["bend"] * kept["rz"] if "rz" in kept else rdz,), {}

    def _slope(self, state: State) -> Tensor:
        if "slope" not in state.kept:
            z = state.kept["z"]
            (state.kept["slope"],) = evaluate(self.derivatives[:1], {ENTRY.value: z}, z)
        return state.kept["slope"]
