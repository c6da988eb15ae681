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

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta.layers import images
from fastmeta.layers.layer import Gradients, Layer, State, Tensors, Wanted, named


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Normalisation per channel of `[N, C, ...]`, by the batch's statistics or by running ones."""

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float
    batch_statistics: bool

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
        if self._by_task(x):
            return self._forward_by_task(state, x)
        rows = images.rows(x)  # [T, R, C]
        if self.batch_statistics:
            h = rows - _mean(rows)
            r = (_mean(h * h) + self.eps).rsqrt()  # [T, 1, C]
        else:
            assert self.mean is not None
            assert self.variance is not None
            h = rows - state.at[self.mean][0]
            r = (state.at[self.variance][0] + self.eps).rsqrt().expand(1, 1, -1)
        h *= r
        state.kept.update(x=x, h=h, r=r)  # Of x, its shape alone is read.
        weight, bias = _wide(state.at, self.weight), _wide(state.at, self.bias)
        y = h if weight is None else h * weight
        return images.like_rows(y if bias is None else y + bias, x)

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        found: dict[str, Tensor] = {}
        if "mean" in state.kept:
            dx = self._backward_by_task(state, wanted, gradient)
            self._give(found, wanted, state.kept["moment"], state.kept["sum"])
            return (dx,), found
        h, r, dy = state.kept["h"], state.kept["r"], images.rows(gradient)
        state.kept["dy"] = dy
        scale = _times(r, _wide(state.at, self.weight))
        if not self.batch_statistics:
            self._give(found, wanted, None if self.weight is None else _sum(h * dy), _sum(dy))
            return (images.like_rows(dy * scale, gradient) if wanted.inputs[0] else None,), found
        sums = _sum(dy), _sum(h * dy)  # [T, 1, C]
        state.kept.update(sum=sums[0], moment=sums[1])
        self._give(found, wanted, sums[1], sums[0])
        if not wanted.inputs[0]:
            return (None,), found
        dx = _through(-scale * sums[0], [(h, -scale * sums[1])], [(dy, scale)])
        return (images.like_rows(dx, gradient),), found

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        (rx,) = inputs
        if "mean" in state.kept:
            # Made here, so that a pass without tangents does without.
            mean, r = state.kept["mean"], state.kept["r"]
            state.kept["h"] = (images.rows(state.kept["x"]) - mean).mul_(r)
        h, r = state.kept["h"], state.kept["r"]
        weight = _wide(state.at, self.weight)
        rweight, rbias = _wide(state.along, self.weight), _wide(state.along, self.bias)
        terms: list[tuple[Tensor, Tensor | None]] = []
        if rx is not None:
            rows = images.rows(rx)
            if self.batch_statistics:
                slant = r * _mean(h * rows)
                rh = torch.addcmul(-r * _mean(rows), rows, r).addcmul_(h, -slant)
                state.kept.update(slant=slant)
            else:
                rh = rows * r
            state.kept["rh"] = rh
            terms.append((rh, weight))
        if rweight is not None:
            terms.append((h, rweight))
        return images.like_rows(_combined(rbias, terms, h), state.kept["x"])

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        kept = state.kept
        h, r, dy, rdy = kept["h"], kept["r"], kept["dy"], images.rows(tangent)
        rh, weight, rweight = (
            kept.get("rh"), _wide(state.at, self.weight), _wide(state.along, self.weight),
        )  # fmt: skip
        found: dict[str, Tensor] = {}
        rsum, rmoment = _sum(rdy), _sum(h * rdy)
        if rh is not None:
            rmoment = rmoment + _sum(rh * dy)
        self._give(found, wanted, rmoment, rsum)
        if not wanted.inputs[0]:
            return (None,), found
        scale = _times(r, weight)
        turn = r * rweight if rweight is not None else torch.zeros_like(scale)
        if not self.batch_statistics:
            rows = rdy * scale if rweight is None else (rdy * scale).addcmul_(dy, turn)
            return (images.like_rows(rows, tangent),), found
        if rh is not None:
            turn = turn - kept["slant"] * scale
        constant = -(scale * rsum + turn * kept["sum"])
        along_h = -(scale * rmoment + turn * kept["moment"])
        spread = [(h, along_h)]
        if rh is not None:
            spread.append((rh, -scale * kept["moment"]))
        rdx = _through(constant, spread, [(rdy, scale), (dy, turn)])
        return (images.like_rows(rdx, tangent),), found

    def _by_task(self, x: Tensor) -> bool:
        """Whether torch's own kernel, which knows one task's statistics, goes task by task.

        It takes a third of the passes over memory; on a GPU its launches would cost more.
        """
        return self.batch_statistics and x.device.type == "cpu"

    def _forward_by_task(self, state: State, x: Tensor) -> Tensor:
        scale, shift = self._affine_of_tasks(state, x)
        found = [
            torch.native_batch_norm(each, w, b, None, None, True, 0.0, self.eps)
            for each, w, b in zip(_of_tasks(x), scale, shift, strict=True)
        ]
        y, mean, r = (images.stacked(parts) for parts in zip(*found, strict=True))
        shape = (len(x), 1, -1)
        state.kept.update(x=x, mean=mean.view(shape), r=r.view(shape))
        return y.unflatten(0, x.shape[:2])

    def _backward_by_task(self, state: State, wanted: Wanted, gradient: Tensor) -> Tensor | None:
        kept = state.kept
        x, mean, r = kept["x"], kept["mean"].squeeze(1), kept["r"].squeeze(1)
        scale, _ = self._affine_of_tasks(state, x)
        mask = [wanted.inputs[0], True, True]
        found = [
            _native_backward(dy, each, w, None, None, m, s, True, self.eps, mask)
            for dy, each, w, m, s in zip(
                _of_tasks(gradient), _of_tasks(x), scale, mean, r, strict=True
            )
        ]
        shape = (len(x), 1, -1)
        kept["dy"] = images.rows(gradient)
        kept["moment"] = images.stacked([moment for _, moment, _ in found]).view(shape)
        kept["sum"] = images.stacked([total for _, _, total in found]).view(shape)
        if not wanted.inputs[0]:
            return None
        return images.stacked([dx for dx, _, _ in found]).unflatten(0, x.shape[:2])

    def _affine_of_tasks(self, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift `[T, C]`, ones and zeros where there are none."""
        scale, shift = named(state.at, self.weight), named(state.at, self.bias)
        shape = (x.shape[0], x.shape[2])
        one = x.new_ones(1, x.shape[2]) if scale is None else scale
        return one.expand(shape), (torch.zeros_like(one) if shift is None else shift).expand(shape)

    def _give(
        self, found: dict[str, Tensor], wanted: Wanted, scale: Tensor | None, shift: Tensor
    ) -> None:
        """Puts the gradients of scale and shift, given as `[T, 1, C]`, into `found`."""
        for name, each in ((self.weight, scale), (self.bias, shift)):
            count = name and wanted.parameters.get(name)
            if name and count and each is not None:
                each = each.squeeze(1)
                found[name] = each if count == len(each) else each.sum(0, keepdim=True)


_native_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.aten.native_batch_norm_backward
)


def _of_tasks(x: Tensor) -> tuple[Tensor, ...]:
    """`[T, N, C, ...]` as `[N, C, ...]` a task."""
    return (images.joined(x) if x.dim() == 5 else x.flatten(0, 1)).chunk(len(x))


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(1, keepdim=True)


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(1, keepdim=True)


def _wide(tensors: Tensors, name: str | None) -> Tensor | None:
    """`[S, C]` as `[S, 1, C]`."""
    tensor = named(tensors, name)
    return None if tensor is None else tensor.unsqueeze(1)


def _times(r: Tensor, weight: Tensor | None) -> Tensor:
    return r if weight is None else r * weight


def _combined(
    constant: Tensor | None, terms: list[tuple[Tensor, Tensor | None]], like: Tensor
) -> Tensor:
    """The sum of rows times factors, and of a constant `[S, 1, C]`, in the shape of `like`."""
    total = torch.zeros_like(like) if constant is None else constant.expand_as(like).clone()
    for rows, factor in terms:
        if factor is None:
            total += rows
        else:
            total.addcmul_(rows, factor)
    return total


def _through(
    constant: Tensor, spread: list[tuple[Tensor, Tensor]], direct: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """`(constant + sum of spread) / R + sum of direct`, each a pass over rows `[T, R, C]`."""
    (first, factor), *rest = spread
    count = first.shape[1]
    total = torch.addcmul(constant / count, first, factor / count)
    for rows, factor in rest:
        total.addcmul_(rows, factor / count)
    for rows, factor in direct:
        total.addcmul_(rows, factor)
    return total
