"""What linear layers and convolutions share: they are linear in their input and in their weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmeta.network.layers.layer import Gradients, Layer, State, Wanted, named


class Product(Layer):
    """`y = x ∘ w + b`. A kind of product gives its three forms; the four rules follow."""

    weight: str
    bias: str | None

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x ∘ w`."""
        raise NotImplementedError

    def to_input(self, gradient: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The gradient of x, which has the shape of `x`."""
        raise NotImplementedError

    def to_weight(self, gradient: Tensor, x: Tensor, weight: Tensor, count: int) -> Tensor:
        """The gradient of w, which has the shape of `weight` behind its `count` (T or 1)."""
        raise NotImplementedError

    # Of a tangent, two of each are added; who can adds them in one sum.

    def apply_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of `x ∘ w` over pairs `(x, w)`."""
        total, *rest = (self.apply(x, w) for x, w in pairs)
        for each in rest:
            total = total + each
        return total

    def all_to_input(self, pairs: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        """The sum of the gradients of x over pairs `(gradient, w)`."""
        total, *rest = (self.to_input(gradient, w, x) for gradient, w in pairs)
        for each in rest:
            total += each
        return total

    def all_to_weight(
        self, pairs: Sequence[tuple[Tensor, Tensor]], weight: Tensor, count: int
    ) -> Tensor:
        """The sum of the gradients of w over pairs `(gradient, x)`."""
        total, *rest = (self.to_weight(gradient, x, weight, count) for gradient, x in pairs)
        for each in rest:
            total += each
        return total

    def to_bias(self, gradient: Tensor) -> Tensor:
        """The gradient of b, `[T, out]`."""
        raise NotImplementedError

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """`y + b`, in place."""
        raise NotImplementedError

    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        state.kept["x"] = x
        return self._with_bias(self.apply(x, state.at[self.weight]), named(state.at, self.bias))

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        state.kept["gradient"] = gradient
        x, weight = state.kept["x"], state.at[self.weight]
        found: dict[str, Tensor] = {}
        count = wanted.parameters.get(self.weight)
        if count:
            found[self.weight] = self.to_weight(gradient, x, weight, count)
        self._add_bias_gradient(found, wanted, gradient)
        return (self.to_input(gradient, weight, x) if wanted.inputs[0] else None,), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        x, weight = state.kept["x"], state.at[self.weight]
        rweight, rbias = named(state.tangents, self.weight), named(state.tangents, self.bias)
        if rx is not None:
            state.kept["rx"] = rx
        pairs = [] if rx is None else [(rx, weight)]
        if rweight is not None:
            pairs.append((x, rweight))
        # Without a pair, the bias alone has a tangent.
        ry = self.apply_all(pairs) if pairs else self.apply(x, weight).zero_()
        return self._with_bias(ry, rbias)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        x, weight, gradient = state.kept["x"], state.at[self.weight], state.kept["gradient"]
        rx, rweight = state.kept.get("rx"), named(state.tangents, self.weight)
        found: dict[str, Tensor] = {}
        count = wanted.parameters.get(self.weight)
        if count:
            pairs = [(tangent, x)] if rx is None else [(tangent, x), (gradient, rx)]
            found[self.weight] = self.all_to_weight(pairs, weight, count)
        self._add_bias_gradient(found, wanted, tangent)
        if not wanted.inputs[0]:
            return (None,), found
        pairs = [(tangent, weight)] if rweight is None else [(tangent, weight), (gradient, rweight)]
        return (self.all_to_input(pairs, x),), found

    def _with_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else self.add_bias(y, bias)

    def _add_bias_gradient(
        self, found: dict[str, Tensor], wanted: Wanted, gradient: Tensor
    ) -> None:
        count = self.bias and wanted.parameters.get(self.bias)
        if self.bias and count:
            each = self.to_bias(gradient)
            found[self.bias] = each if count == len(each) else each.sum(0, keepdim=True)
