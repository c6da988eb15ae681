"""What GroupNorm and LayerNorm share: statistics of each example's own numbers.

Of a piece of M numbers, m being its mean: `h = r (x - m(x))`, `r = 1 / sqrt(m((x - m(x))²) + eps)`.
With `P(u) = r (u - m(u) - m(h u) h)`, which is symmetric, and `c = r m(h rx)`:

    y = w h + b        dh = w dy                dx = P(dh)
    rh = P(rx)         rdh = w rdy + rw dy
    rdx = P(rdh) - c dx - r (m(h dh) rh + m(rh dh) h)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.layers.layer import Gradients, Layer, State, Tensors, Wanted, named, plus


class ExampleNorm(Layer):
    """Normalises pieces of each example; a kind says which, and where scale and shift stand."""

    weight: str | None
    bias: str | None
    eps: float

    def pieces(self, x: Tensor) -> Tensor:
        """`[T, N, ...]` as `[..., M]`."""
        raise NotImplementedError

    def wide(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter `[S, ...]` so that it broadcasts to `x`."""
        raise NotImplementedError

    def narrow(self, product: Tensor) -> Tensor:
        """The sum of `[T, N, ...]` over all that a parameter broadcasts to, `[T, ...]`."""
        raise NotImplementedError

    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 4 * output.numel()

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        pieces = self.pieces(x)
        h = pieces - _mean(pieces)
        r = (_mean(h * h) + self.eps).rsqrt()
        h *= r
        state.kept.update(x=x, h=h, r=r)  # Of x, its shape alone is read.
        y = self._scaled(h.view(x.shape), named(state.at, self.weight))
        bias = named(state.at, self.bias)
        return y if bias is None else y + self.wide(bias, x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        kept = state.kept
        dh = self._scaled(gradient, named(state.at, self.weight))
        pieces = self.pieces(dh)
        kept.update(gradient=gradient, dh=pieces)
        found = self._parameter_gradients(wanted, gradient, kept["h"].view_as(gradient) * gradient)
        if not wanted.inputs[0]:
            return (None,), found
        return (self._projected(state, pieces).view(gradient.shape),), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        x, h, r = state.kept["x"], state.kept["h"], state.kept["r"]
        ry: Tensor | None = None
        if rx is not None:
            pieces = self.pieces(rx)
            rh = self._projected(state, pieces)
            state.kept.update(rh=rh, slant=r * _mean(h * pieces))
            ry = self._scaled(rh.view(x.shape), named(state.at, self.weight))
        rweight, rbias = named(state.along, self.weight), named(state.along, self.bias)
        if rweight is not None:
            ry = plus(ry, self._scaled(h.view(x.shape), rweight))
        if rbias is not None:
            ry = plus(ry, self.wide(rbias, x))
        assert ry is not None
        return ry.expand_as(x)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        kept = state.kept
        h, r, dh, gradient = kept["h"], kept["r"], kept["dh"], kept["gradient"]
        rh = kept.get("rh")
        product = h.view_as(tangent) * tangent
        if rh is not None:
            product = product + rh.view_as(tangent) * gradient
        found = self._parameter_gradients(wanted, tangent, product)
        if not wanted.inputs[0]:
            return (None,), found
        rdh = self._scaled(tangent, named(state.at, self.weight))
        rweight = named(state.along, self.weight)
        if rweight is not None:
            rdh = rdh + self._scaled(gradient, rweight)
        rdx = self._projected(state, self.pieces(rdh))
        if rh is not None:
            bent = _mean(h * dh) * rh + _mean(rh * dh) * h
            rdx = rdx - kept["slant"] * self._projected(state, dh) - r * bent
        return (rdx.view_as(tangent),), found

    def _projected(self, state: State, u: Tensor) -> Tensor:
        """`P(u)`."""
        h, r = state.kept["h"], state.kept["r"]
        return torch.addcmul(u - _mean(u), h, _mean(h * u), value=-1).mul_(r)

    def _scaled(self, u: Tensor, weight: Tensor | None) -> Tensor:
        return u if weight is None else u * self.wide(weight, u)

    def _parameter_gradients(
        self, wanted: Wanted, shift: Tensor, scale: Tensor
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, product in ((self.weight, scale), (self.bias, shift)):
            count = name and wanted.parameters.get(name)
            if name and count:
                each = self.narrow(product)
                found[name] = each if count == len(each) else each.sum(0, keepdim=True)
        return found


def _mean(pieces: Tensor) -> Tensor:
    return pieces.mean(-1, keepdim=True)
