"""Max, average and adaptive average pooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers import images
from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted

_backward_of_max: Callable[..., Tensor] = torch.ops.aten.max_pool2d_with_indices_backward
_backward_of_average: Callable[..., Tensor] = torch.ops.aten.avg_pool2d_backward
_backward_of_adaptive: Callable[..., Tensor] = torch.ops.aten._adaptive_avg_pool2d_backward


@dataclass(frozen=True)
class Pool2d(Layer):
    """Pooling of `[N, C, H, W]`, with the options of its torch function.

    All are linear once the indices of the maxima are known, so the tangent is the pooling of the
    tangent, and both backward rules its transpose.
    """

    kind: str
    options: tuple[tuple[str, Any], ...]

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return getattr(F, self.kind)(inputs[0], **dict(self.options))

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return output.numel() * math.prod(_pair(dict(self.options).get("kernel_size", 1)))

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state.kept["x"] = x  # Its shape alone is read.
        batch = images.joined(x)
        if self.kind != "max_pool2d":
            return self._average(batch).unflatten(0, x.shape[:2])
        y, indices = F.max_pool2d_with_indices(batch, **dict(self.options))
        state.kept["indices"] = indices
        return y.unflatten(0, x.shape[:2])

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        if not wanted.inputs[0]:
            return (None,), {}
        x = state.kept["x"]
        dy, batch = images.joined(gradient), images.joined(x)
        if self.kind == "max_pool2d":
            size, stride, *rest = self._window()
            dx = _backward_of_max(
                dy, batch, size, stride, *map(_pair, rest), self._option("ceil_mode", False),
                state.kept["indices"],
            )  # fmt: skip
        elif self.kind == "avg_pool2d":
            size, stride, padding, _ = self._window()
            dx = _backward_of_average(
                dy, batch, size, stride, padding, self._option("ceil_mode", False),
                self._option("count_include_pad", True), self._option("divisor_override", None),
            )  # fmt: skip
        else:
            dx = _backward_of_adaptive(dy, batch)
        return (dx.unflatten(0, x.shape[:2]),), {}

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        assert rx is not None
        batch = images.joined(rx)
        if self.kind != "max_pool2d":
            return self._average(batch).unflatten(0, rx.shape[:2])
        indices = state.kept["indices"]
        ry = batch.flatten(2).gather(2, indices.flatten(2))
        return ry.view(indices.shape).unflatten(0, rx.shape[:2])

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        return self.backward(state, wanted, tangent)

    def _average(self, batch: Tensor) -> Tensor:
        return getattr(F, self.kind)(batch, **dict(self.options))

    def _option(self, name: str, default: Any) -> Any:
        return dict(self.options).get(name, default)

    def _window(self) -> tuple[tuple[int, ...], ...]:
        """Kernel size, stride, padding and dilation."""
        size = _pair(self._option("kernel_size", None))
        stride = self._option("stride", None)
        return (
            size,
            _pair(stride) if stride else size,
            _pair(self._option("padding", 0)),
            _pair(self._option("dilation", 1)),
        )


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
