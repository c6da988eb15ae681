"""A dense layer's rules as operations: forward, backward, and the tangents of both."""

from __future__ import annotations

from dataclasses import dataclass

from fastmeta.executors.fused.lowering import Dense
from fastmeta.executors.fused.operations.layout import Tangent, Trace
from fastmeta.executors.fused.operations.table import Table
from fastmeta.executors.fused.operations.views import View

Tensors = list[View | None]
"""Weight, bias, scale and shift; None what a layer does not have."""


@dataclass(frozen=True)
class Layer:
    """A layer in its place: its operations go to the table."""

    table: Table
    dense: Dense
    zero: View
    one: View

    def forward(self, x: View, t: Trace, at: Tensors) -> None:
        """`f(norm(x W' + b))`."""
        weight, bias = at[:2]
        assert weight is not None
        product = x, weight.turned
        b = self._row(bias, t.z, self.zero)
        if not self.dense.norm:
            ending = (b,)
            self.table.product("FORWARD", t.z, product, None, None, ending, t.value, self.dense)
            return
        self.table.product("FORWARD", t.product, product, ending=(b,))
        self.forward_norm(t, at)

    def forward_norm(self, t: Trace, at: Tensors) -> None:
        """From the product, which is left normalised, through norm and activation."""
        self.table.norm(
            "NORM_FORWARD", self.dense, t.z, N=t.product, S=t.inverse, MEAN=t.mean,
            G=self._row(at[2], t.z, self.one), B=self._row(at[3], t.z, self.zero), OUT=t.z,
        )  # fmt: skip
        if self.dense.activation:
            self.table.product("FORWARD", t.z, ending=(t.z,), out2=t.value, layer=self.dense)

    def backward_through_norm(self, t: Trace, at: Tensors) -> None:
        """`t.delta` to `t.product_delta`."""
        if self.dense.norm:
            self._norm_backward(t, at, t.delta, t.product_delta, t.plain, t.along)

    def _norm_backward(
        self, t: Trace, at: Tensors, delta: View, out: View, plain: View, along: View
    ) -> None:
        self.table.norm(
            "NORM_BACKWARD", self.dense, t.z, N=t.product, S=t.inverse,
            G=self._row(at[2], t.z, self.one), DELTA=delta, PLAIN=plain, ALONG=along, OUT=out,
        )  # fmt: skip

    def backward_input(self, t: Trace, at: Tensors, below: Layer, b: Trace) -> None:
        """To the derivatives after and before the activation of the layer below."""
        weight = at[0]
        assert weight is not None
        self.table.product(
            "THROUGH", b.derivative, (t.product_delta, weight),
            ending=(None, None, b.z), out2=b.delta, layer=below.dense,
        )  # fmt: skip

    def backward_through_activation(self, t: Trace) -> None:
        """`t.derivative` to `t.delta`."""
        if self.dense.activation:
            self._through_activation(t.derivative, t.delta, (t.z,))

    def tangent_backward_through_activation(self, t: Trace, r: Tangent) -> None:
        """The tangent of that, of `r.delta` in its place."""
        if self.dense.activation:
            self._through_activation(r.delta, r.delta, (t.z, r.z, t.derivative))

    def _through_activation(self, of: View, out: View, ending: tuple[View, ...]) -> None:
        self.table.product(
            "THROUGH", of, ending=(of, self.one.like(of), *ending), out2=out, layer=self.dense
        )

    def gradients(self, x: View, t: Trace) -> list[tuple[View, View]]:
        """Of weight, bias, scale and shift: two matrices whose product it is."""
        return self._factors(x, t.product_delta, t.plain, t.along)

    def _factors(self, x: View, delta: View, plain: View, along: View) -> list[tuple[View, View]]:
        ones = self.one.throughout(1, delta.rows)
        return [(delta.turned, x), (ones, delta), (self.one, along), (self.one, plain)]

    def tangent_forward(
        self, x: View, rx: View | None, t: Trace, r: Tangent, at: Tensors, along: Tensors,
        rates: Tensors,
    ) -> bool:  # fmt: skip
        """Along the input's tangent and `rates * along`; whether there is any tangent."""
        weight = at[0]
        assert weight is not None
        if rx is None and not any(along):
            return False
        first = (rx, weight.turned) if rx else None
        second = scale = None
        if along[0] and rates[0]:
            second, scale = (x, along[0].turned), rates[0].turned
        bias = self._row(along[1], t.z, self.zero), self._row(rates[1], t.z, self.zero)
        if not self.dense.norm:
            self.table.product(
                "THROUGH", r.z, first, second, scale, (*bias, t.z), r.value, self.dense
            )
            return True
        self.table.product("THROUGH", r.z, first, second, scale, (*bias, t.z), r.z)
        self.tangent_forward_norm(t, r, at, along, rates)
        return True

    def tangent_forward_norm(
        self, t: Trace, r: Tangent, at: Tensors, along: Tensors, rates: Tensors
    ) -> None:
        """From the product's tangent, in `r.z`, through norm and activation."""
        self.table.norm(
            "NORM_TANGENT_FORWARD", self.dense, t.z, N=t.product, S=t.inverse,
            **self._of_scale(t, at, along, rates),
            B_COTANGENT=self._row(along[3], t.z, self.zero),
            B_RATE=self._row(rates[3], t.z, self.zero), IN=r.z,
            TANGENT=r.normalised, STRETCH=r.stretch, OUT=r.z,
        )  # fmt: skip
        if self.dense.activation:
            self._through_activation(r.z, r.value, (t.z,))

    def tangent_backward_through_norm(
        self, t: Trace, r: Tangent, at: Tensors, along: Tensors, rates: Tensors, moved: bool
    ) -> None:
        """`r.delta` from before the activation to before the norm; `moved`: it has a tangent."""
        if self.dense.norm and not moved:
            self._norm_backward(t, at, r.delta, r.delta, r.plain, r.along)
        elif self.dense.norm:
            self.table.norm(
                "NORM_TANGENT_BACKWARD", self.dense, t.z, N=t.product, S=t.inverse,
                **self._of_scale(t, at, along, rates), DELTA=t.delta, PLAIN=t.plain,
                ALONG=t.along, TANGENT=r.normalised, STRETCH=r.stretch, IN=r.delta,
                IN_PLAIN=r.plain, IN_ALONG=r.along, OUT=r.delta,
            )  # fmt: skip

    def _of_scale(self, t: Trace, at: Tensors, along: Tensors, rates: Tensors) -> dict[str, View]:
        return {
            "G": self._row(at[2], t.z, self.one),
            "G_COTANGENT": self._row(along[2], t.z, self.zero),
            "G_RATE": self._row(rates[2], t.z, self.zero),
        }

    def tangent_backward_input(
        self, t: Trace, r: Tangent, at: Tensors, along: Tensors, rates: Tensors,
        below: Layer, b: Trace, rb: Tangent, moved: bool,
    ) -> None:  # fmt: skip
        """To before the activation of the layer below; `moved`: that has a tangent."""
        weight, second, scale = at[0], None, None
        assert weight is not None
        if along[0]:
            second, scale = (t.product_delta, along[0]), rates[0]
        ending = (None, None, b.z, *((rb.z, b.derivative) if moved else ()))
        self.table.product(
            "THROUGH", rb.delta, (r.delta, weight), second, scale, ending, layer=below.dense
        )

    def hessians(
        self, x: View, rx: View | None, t: Trace, r: Tangent
    ) -> list[tuple[tuple[View, View], tuple[View, View] | None]]:
        """Of each tensor's gradient the tangent, as two products."""
        first = self._factors(x, r.delta, r.plain, r.along)
        of_weight = (t.product_delta.turned, rx) if rx else None
        return [(first[0], of_weight), *((pair, None) for pair in first[1:])]

    def _row(self, view: View | None, like: View, instead: View) -> View:
        """A row beside every row of a matrix, or a number where there is none."""
        return view.repeated(like.rows) if view else instead.like(like)
