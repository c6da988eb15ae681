"""What GroupNorm, LayerNorm and RMSNorm share: statistics of each example's own numbers.

Of a piece of M numbers, m being its mean: `h = r (x - m(x))`, `r = 1 / sqrt(m((x - m(x))²) + eps)`.
With `P(u) = r (u - m(u) - m(h u) h)`, which is symmetric, and `c = r m(h rx)`:

    y = w h + b        dh = w dy                dx = P(dh)
    rh = P(rx)         rdh = w rdy + rw dy
    rdx = P(rdh) - c dx - r (m(h dh) rh + m(rh dh) h)
"""

from __future__ import annotations

from torch import Tensor

from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted, named, plus


class ExampleNorm(Layer):
    """Normalises pieces of each example; a kind says which, and where scale and shift stand."""

    weight: str | None
    bias: str | None

    def mean(self, x: Tensor) -> Tensor:
        """The mean over each piece of `[T, N, ...]`, so that it broadcasts to `x`."""
        raise NotImplementedError

    def centred(self, x: Tensor) -> Tensor:
        """`x` for torch's own kernel: centred where that would lose the digits of a large mean."""
        return x

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, and mean and r of the pieces as torch's own kernel gives them."""
        raise NotImplementedError

    def spread(self, r: Tensor, x: Tensor) -> Tensor:
        """That r, so that it broadcasts to `x`."""
        raise NotImplementedError

    def projected(self, u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        """`P(u)`: torch's own backward."""
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
        x = self.centred(inputs[0])
        h, mean, r = self.normalised(x)
        state.kept.update(x=x, h=h, mean=mean, r=r)
        y = self._scaled(h, named(state.at, self.weight))
        bias = named(state.at, self.bias)
        return y if bias is None else y + self.wide(bias, x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        kept = state.kept
        dh = self._scaled(gradient, named(state.at, self.weight))
        kept.update(gradient=gradient, dh=dh)
        found = self._parameter_gradients(wanted, gradient, kept["h"] * gradient)
        if not wanted.inputs[0]:
            return (None,), found
        kept["dx"] = self._projected(state, dh)
        return (kept["dx"],), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        h = state.kept["h"]
        ry: Tensor | None = None
        if rx is not None:
            rh = self._projected(state, rx)
            state.kept.update(rh=rh, slant=self.mean(h * rx))
            ry = self._scaled(rh, named(state.at, self.weight))
        rweight, rbias = named(state.tangents, self.weight), named(state.tangents, self.bias)
        if rweight is not None:
            ry = plus(ry, self._scaled(h, rweight))
        if rbias is not None:
            ry = plus(ry, self.wide(rbias, h))
        assert ry is not None
        return ry.expand_as(h)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        kept = state.kept
        h, dh, gradient = kept["h"], kept["dh"], kept["gradient"]
        rh = kept.get("rh")
        product = h * tangent
        if rh is not None:
            product.addcmul_(rh, gradient)
        found = self._parameter_gradients(wanted, tangent, product)
        if not wanted.inputs[0]:
            return (None,), found
        rdh = self._scaled(tangent, named(state.at, self.weight))
        rweight = named(state.tangents, self.weight)
        if rweight is not None:
            rdh = rdh + self._scaled(gradient, rweight)
        rdx = self._projected(state, rdh)
        if rh is not None:
            r = self.spread(kept["r"], h)
            rdx.addcmul_(kept["dx"], r * kept["slant"], value=-1)
            rdx.addcmul_(rh, r * self.mean(h * dh), value=-1)
            rdx.addcmul_(h, r * self.mean(rh * dh), value=-1)
        return (rdx,), found

    def _projected(self, state: State, u: Tensor) -> Tensor:
        return self.projected(u, state.kept["x"], state.kept["mean"], state.kept["r"])

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
