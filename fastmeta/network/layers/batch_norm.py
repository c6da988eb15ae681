"""Normalisation per channel, by the statistics of each task's set or by running ones.

With the statistics of the set, m being the mean over its R rows and S the sum:

    h = r (x - m(x))                   r = 1 / sqrt(m((x - m(x))²) + eps)      y = w h + b
    dx = r w (dy - (S(dy) + h S(h dy)) / R)             dw = S(h dy)           db = S(dy)
    rh = r (rx - m(rx)) - c h          c = r m(h rx)                           ry = w rh + rw h + rb
    rdx = -c dx + r (w rdy + rw dy - (w S(rdy) + rw S(dy) + w S(h dy) rh
                                      + (w S(rh dy) + w S(h rdy) + rw S(h dy)) h) / R)
    rdw = S(rh dy) + S(h rdy)          rdb = S(rdy)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.network.layers import images, rows
from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted, named
from fastmeta.network.layers.rows import Rows


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Normalisation per channel of `[N, C, ...]`, by the batch's statistics or by running ones."""

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float
    batch_statistics: bool

    @property
    def mixes_examples(self) -> bool:
        return self.batch_statistics

    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def buffers(self) -> tuple[str, ...]:
        """The names of the statistics that it reads."""
        if self.batch_statistics:
            return ()
        return tuple(name for name in (self.mean, self.variance) if name is not None)

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        return F.batch_norm(
            inputs[0],
            None if self.batch_statistics else named(tensors, self.mean),
            None if self.batch_statistics else named(tensors, self.variance),
            named(tensors, self.weight),
            named(tensors, self.bias),
            self.batch_statistics,
            0.0,
            self.eps,
        )

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return 4 * output.numel()

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        values = images.rows(x)  # [T, R, C]
        if self.batch_statistics:
            mean = rows.mean(values)  # [T, 1, C]
            centred = Rows(values, mean)
            (squares,) = rows.sums((centred, centred))
            r = (squares / centred.count + self.eps).rsqrt()
        else:
            mean, variance = _wide(state.at, self.mean), _wide(state.at, self.variance)
            assert mean is not None
            assert variance is not None
            centred, r = Rows(values, mean), (variance + self.eps).rsqrt()
        state.kept.update(x=x, mean=mean, r=r)
        scale = _times(r, _wide(state.at, self.weight))
        y = rows.weighted(_wide(state.at, self.bias), (centred, scale))
        return images.like_rows(y, x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        found: dict[str, Tensor] = {}
        x, r, dy = self._centred(state), state.kept["r"], Rows(images.rows(gradient))
        state.kept["dy"] = dy.values
        total, moment = rows.sums((dy,), (x, dy))  # [T, 1, C]
        moment = moment * r
        state.kept.update(sum=total, moment=moment)
        self._give(found, wanted, moment, total)
        if not wanted.inputs[0]:
            return (None,), found
        scale = _times(r, _wide(state.at, self.weight))
        if not self.batch_statistics:
            return (images.like_rows(dy.values * scale, gradient),), found
        share = scale / -x.count
        dx = rows.weighted(share * total, (x, share * moment * r), (dy, scale))
        return (images.like_rows(dx, gradient),), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        kept, r, x = state.kept, state.kept["r"], self._centred(state)
        weight, rweight = _wide(state.at, self.weight), _wide(state.tangents, self.weight)
        # By h: that of the scale, and where statistics move, what rh has of it.
        along_h = torch.zeros_like(r) if rweight is None else rweight
        terms: list[tuple[Rows, Tensor]] = []
        if rx is not None:
            moving = Rows(images.rows(rx))
            if self.batch_statistics:
                kept["rmean"] = rows.mean(moving.values)
                moving = Rows(moving.values, kept["rmean"])
                (along,) = rows.sums((x, moving))
                slant = along * r * r / x.count
                along_h = along_h - _times(slant, weight)
                kept["slant"] = slant
            kept["rx"] = moving.values
            terms.append((moving, _times(r, weight)))
        terms.append((x, along_h * r))
        shift = _wide(state.tangents, self.bias)
        return images.like_rows(rows.weighted(shift, *terms), kept["x"])

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        kept, r, x = state.kept, state.kept["r"], self._centred(state)
        dy, rdy = Rows(kept["dy"]), Rows(images.rows(tangent))
        rx = Rows(kept["rx"], kept.get("rmean")) if "rx" in kept else None
        slant = kept.get("slant")
        rsum, along_x, *along_rx = rows.sums((rdy,), (x, rdy), *([(rx, dy)] if rx else []))
        rmoment = r * sum(along_rx, along_x)
        if slant is not None:  # rh = r (rx - m(rx)) - slant h
            rmoment = rmoment - slant * kept["moment"]
        found: dict[str, Tensor] = {}
        self._give(found, wanted, rmoment, rsum)
        if not wanted.inputs[0]:
            return (None,), found
        scale, rweight = _times(r, _wide(state.at, self.weight)), _wide(state.tangents, self.weight)
        turn = torch.zeros_like(scale) if rweight is None else r * rweight
        if slant is not None:
            turn = turn - slant * scale
        terms, constant = [(rdy, scale), (dy, turn)], None
        if self.batch_statistics:
            constant = (scale * rsum + turn * kept["sum"]) / -x.count
            along_h = (scale * rmoment + turn * kept["moment"]) / -x.count
            if rx is not None and slant is not None:
                along_rh = scale * kept["moment"] / -x.count
                along_h = along_h - along_rh * slant
                terms.append((rx, along_rh * r))
            terms.append((x, along_h * r))
        return (images.like_rows(rows.weighted(constant, *terms), tangent),), found

    def _centred(self, state: State) -> Rows:
        return Rows(images.rows(state.kept["x"]), state.kept["mean"])

    def _give(
        self, found: dict[str, Tensor], wanted: Wanted, scale: Tensor | None, shift: Tensor
    ) -> None:
        """Puts the gradients of scale and shift, given as `[T, 1, C]`, into `found`."""
        for name, each in ((self.weight, scale), (self.bias, shift)):
            count = name and wanted.parameters.get(name)
            if name and count and each is not None:
                each = each.squeeze(1)
                found[name] = each if count == len(each) else each.sum(0, keepdim=True)


def _wide(tensors: Tensors, name: str | None) -> Tensor | None:
    """`[S, C]` as `[S, 1, C]`."""
    tensor = named(tensors, name)
    return None if tensor is None else tensor.unsqueeze(1)


def _times(r: Tensor, weight: Tensor | None) -> Tensor:
    return r if weight is None else r * weight
