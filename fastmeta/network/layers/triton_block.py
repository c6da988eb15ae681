"""A convolution, batch norm, activation and maximum of a window, by Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.network.layers.batch_norm import BatchNorm
from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted, named
from fastmeta.network.layers.triton_conv2d import TritonConv2d, kernels


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
        scale, shift = named(state.at, self.norm.weight), named(state.at, self.norm.bias)
        if scale is None or shift is None:
            one = weight.new_ones(1, weight.shape[1])
            scale = one if scale is None else scale
            shift = torch.zeros_like(one) if shift is None else shift
        form = kernels("block").Block(self.norm.eps, self.slope, self.window)
        out, state.of_kernels = kernels("block").forward(form, y, partial, rows, scale, shift)
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
        rweight = named(state.tangents, self.conv.weight)
        pairs: list[tuple[Tensor, Tensor]] = []
        if rx is not None:
            state.kept["rx"] = rx
            pairs.append((rx, weight))
        if rweight is not None:
            pairs.append((x, rweight))
        # Without a pair, the norm's parameters alone have tangents.
        ry = self.conv.apply_all(pairs or [(x, torch.zeros_like(weight))])
        along, shift = (
            named(state.tangents, self.norm.weight),
            named(state.tangents, self.norm.bias),
        )
        return kernels("block").tangent(done, ry, along, shift)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        done, kept, weight = state.of_kernels, state.kept, state.at[self.conv.weight]
        rweight = named(state.tangents, self.conv.weight)
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
        """What is wanted, from S(dz) and S(h dz) `[2, T, C]` and the pairs of the convolution."""
        found: dict[str, Tensor] = {}
        weight, x = to_input[0][1], to_weight[0][1]
        counts = wanted.parameters
        if count := counts.get(self.conv.weight):
            found[self.conv.weight] = self.conv.all_to_weight(to_weight, weight, count)
        if self.conv.bias and (count := counts.get(self.conv.bias)):
            found[self.conv.bias] = sums.new_zeros(count, sums.shape[2])
        names = enumerate((self.norm.bias, self.norm.weight))
        of_norm = {name: i for i, name in names if name and name in counts}
        shared = any(counts[name] != sums.shape[1] for name in of_norm)
        summed = sums.sum(1, keepdim=True) if shared else sums  # [2, 1, C]
        for name, i in of_norm.items():
            found[name] = (sums if counts[name] == sums.shape[1] else summed)[i]
        return (self.conv.all_to_input(to_input, x) if wanted.inputs[0] else None,), found
