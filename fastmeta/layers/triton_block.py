"""A convolution, batch norm, activation and maximum of a window, by Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.layers.batch_norm import BatchNorm
from fastmeta.layers.layer import Gradients, Layer, State, Tensors, Wanted, named
from fastmeta.layers.triton_conv2d import TritonConv2d, kernels


@dataclass(frozen=True)
class TritonBlock(Layer):
    """`max over windows of f(norm(conv(x)))`; the norm is by the set's statistics.

    The bias of the convolution is left out: the norm takes it away, and its gradient is zero.
    """

    conv: TritonConv2d
    norm: BatchNorm
    parts: tuple[Layer, ...]
    """The layers that it stands for, in order."""
    slope: float
    """Of what is not positive; 1 where there is no activation."""
    window: tuple[int, int]
    """Of the pooling; (1, 1) where there is none."""

    def parameters(self) -> tuple[str, ...]:
        return (*self.conv.parameters(), *self.norm.parameters())

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for part in self.parts:
            x = part.reference(tensors, x)
        return x

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state.kept["x"] = x
        weight, conv = state.at[self.conv.weight], self.conv
        y, partial, rows = kernels("convolve").with_statistics(
            conv.numbers(), x, weight, conv.size(x, weight)
        )
        one = torch.ones_like(weight[:1, :, 0, 0, 0])
        scale, shift = named(state.at, self.norm.weight), named(state.at, self.norm.bias)
        form = kernels("block").Block(self.norm.eps, self.slope, self.window)
        out, state.of_kernels = kernels("block").forward(
            form, y, partial, rows, one if scale is None else scale,
            torch.zeros_like(one) if shift is None else shift,
        )  # fmt: skip
        return out

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        done, x, weight = state.of_kernels, state.kept["x"], state.at[self.conv.weight]
        sums = kernels("block").backward_sums(done, gradient)
        # Of the convolution's output; tangents need it too.
        state.kept["dy"] = dy = kernels("block").backward(done)
        return self._give(wanted, sums, [(dy, x)], [(dy, weight)])

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        done, x, weight = state.of_kernels, state.kept["x"], state.at[self.conv.weight]
        rweight = named(state.along, self.conv.weight)
        pairs: list[tuple[Tensor, Tensor]] = []
        if rx is not None:
            state.kept["rx"] = rx
            pairs.append((rx, weight))
        if rweight is not None:
            pairs.append((x, rweight))
        # Without a pair, the norm's parameters alone have tangents.
        ry = self.conv.apply_all(pairs or [(x, torch.zeros_like(weight))])
        along, shift = named(state.along, self.norm.weight), named(state.along, self.norm.bias)
        return kernels("block").tangent(done, ry, along, shift)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        done, kept, weight = state.of_kernels, state.kept, state.at[self.conv.weight]
        rweight = named(state.along, self.conv.weight)
        sums = kernels("block").tangent_sums(done, tangent)
        rdy = kernels("block").tangent_backward(done, tangent, sums)
        to_weight, to_input = [(rdy, kept["x"])], [(rdy, weight)]
        if "rx" in kept:
            to_weight.append((kept["dy"], kept["rx"]))
        if rweight is not None:
            to_input.append((kept["dy"], rweight))
        return self._give(wanted, sums, to_weight, to_input)

    def _give(
        self, wanted: Wanted, sums: Tensor, to_weight: list[tuple[Tensor, Tensor]],
        to_input: list[tuple[Tensor, Tensor]],
    ) -> Gradients:  # fmt: skip
        """What is wanted, from S(dz) and S(h dz) `[T, 2, C]` and the pairs of the convolution."""
        found: dict[str, Tensor] = {}
        weight, x = to_input[0][1], to_weight[0][1]
        count = wanted.parameters.get(self.conv.weight)
        if count:
            found[self.conv.weight] = self.conv.all_to_weight(to_weight, weight, count)
        zero = torch.zeros_like(sums[:, 0])
        for name, each in (
            (self.conv.bias, zero), (self.norm.weight, sums[:, 1]), (self.norm.bias, sums[:, 0]),
        ):  # fmt: skip
            count = name and wanted.parameters.get(name)
            if name and count:
                found[name] = each if count == len(each) else each.sum(0, keepdim=True)
        return (self.conv.all_to_input(to_input, x) if wanted.inputs[0] else None,), found
