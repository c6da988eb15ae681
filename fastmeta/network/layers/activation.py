"""Elementwise functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted

_aten = torch.ops.aten
_STRAIGHT = ("relu", "leaky_relu")
"""Of zero curvature."""
_BY_OUTPUT = ("relu", "tanh", "sigmoid")
"""Whose derivatives are known from their output."""


@dataclass(frozen=True)
class Activation(Layer):
    """An elementwise function out of `torch.nn.functional`, with its options.

    With z its input: `dz = f'(z) dy`, `ry = f'(z) rz`, `rdz = f'(z) rdy + f''(z) rz dy`. At a
    corner, f' is what torch takes.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        if self.kind in ("tanh", "sigmoid"):
            return getattr(torch, self.kind)(inputs[0])
        return getattr(F, self.kind)(inputs[0], **dict(self.options))

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        y = self.reference({}, *inputs)
        state.kept["at"] = y if self.kind in _BY_OUTPUT else inputs[0]
        return y

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        if not wanted.inputs[0]:
            return (None,), {}
        if self.kind not in _STRAIGHT:
            state.kept["gradient"] = gradient
        return (self._sloped(gradient, state.kept["at"]),), {}

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rz,) = inputs
        assert rz is not None
        if self.kind not in _STRAIGHT:
            state.kept["rz"] = rz
        return self._sloped(rz, state.kept["at"])

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        if not wanted.inputs[0]:
            return (None,), {}
        kept = state.kept
        rdz = self._sloped(tangent, kept["at"])
        if self.kind not in _STRAIGHT:
            rdz = rdz + self._curvature(kept["at"]) * kept["rz"] * kept["gradient"]
        return (rdz,), {}

    def _sloped(self, v: Tensor, at: Tensor) -> Tensor:
        """`f' v`, by torch's own backward."""
        return _SLOPED[self.kind](v, at, dict(self.options))

    def _curvature(self, at: Tensor) -> Tensor:
        """`f''`."""
        return _CURVATURE[self.kind](at, dict(self.options))


def _softplus(v: Tensor, z: Tensor, options: dict[str, Any]) -> Tensor:
    beta, threshold = options.get("beta", 1.0), options.get("threshold", 20.0)
    return _aten.softplus_backward(v, z, beta, threshold)


_SLOPED: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "relu": lambda v, y, _: _aten.threshold_backward(v, y, 0),
    "leaky_relu": lambda v, z, options: _aten.leaky_relu_backward(
        v, z, options.get("negative_slope", 0.01), False
    ),
    "tanh": lambda v, y, _: _aten.tanh_backward(v, y),
    "sigmoid": lambda v, y, _: _aten.sigmoid_backward(v, y),
    "elu": lambda v, z, options: _aten.elu_backward(v, options.get("alpha", 1.0), 1, 1, False, z),
    "softplus": _softplus,
    "silu": lambda v, z, _: _aten.silu_backward(v, z),
    "gelu": lambda v, z, options: _aten.gelu_backward(
        v, z, approximate=options.get("approximate", "none")
    ),
}


def _curvature_of_elu(z: Tensor, options: dict[str, Any]) -> Tensor:
    return torch.where(z > 0, 0.0, options.get("alpha", 1.0) * z.clamp(max=0).exp())


def _curvature_of_softplus(z: Tensor, options: dict[str, Any]) -> Tensor:
    beta, threshold = options.get("beta", 1.0), options.get("threshold", 20.0)
    s = torch.sigmoid(beta * z)
    return torch.where(beta * z > threshold, 0.0, beta * s * (1 - s))


def _curvature_of_silu(z: Tensor, _: dict[str, Any]) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _curvature_of_gelu(z: Tensor, options: dict[str, Any]) -> Tensor:
    if options.get("approximate", "none") == "none":
        return (-0.5 * z * z).exp() * (2 - z * z) / math.sqrt(2 * math.pi)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z * z * z))
    slope, bend = scale * (1 + 3 * cubic * z * z), 6 * scale * cubic * z
    return (1 - t * t) * (slope + 0.5 * z * (bend - 2 * t * slope * slope))


_CURVATURE: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "tanh": lambda y, _: 2 * y * (y * y - 1),
    "sigmoid": lambda y, _: y * (1 - y) * (1 - 2 * y),
    "elu": _curvature_of_elu,
    "softplus": _curvature_of_softplus,
    "silu": _curvature_of_silu,
    "gelu": _curvature_of_gelu,
}
