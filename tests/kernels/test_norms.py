"""The four rules of batch norm beside autograd, on sizes that cross the edges of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_on_host import TASKS, Machine

from fastmeta.executors.fused.operations.layers import Layer
from fastmeta.executors.fused.operations.layout import Tangent, Trace
from fastmeta.executors.fused.lowering import Dense
from fastmeta.network.graph import BatchNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # by torch.func
]

EPS = 0.01


def drawn(*size: int) -> Tensor:
    return torch.randn(TASKS, *size, dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("size", [(2, 1), (5, 33), (33, 3), (65, 40)], ids=str)
def test_the_four_rules(size: tuple[int, int], batch: bool, affine: bool) -> None:
    """Of z = norm(u) along (u', g', b'), and of du along (z', dz') too."""
    u, ru, dz, rdz = (drawn(*size) for _ in range(4))
    g, b, rg, rb, mean, inverse = (drawn(1, size[1]) for _ in range(6))
    if not affine:
        g, b, rg, rb = torch.ones_like(g), torch.zeros_like(b), 0 * rg, 0 * rb
    inverse = inverse.abs()

    def forward(u: Tensor, g: Tensor, b: Tensor) -> Tensor:
        m, s = mean, inverse
        if batch:
            m = u.mean(1, keepdim=True)
            s = ((u - m).square().mean(1, keepdim=True) + EPS).rsqrt()
        return g * (u - m) * s + b

    def backward(u: Tensor, g: Tensor, b: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(forward, u, g, b)[1](dz)

    z, rz = torch.func.jvp(forward, (u, g, b), (ru, rg, rb))
    (du, dg, db), (rdu, rdg, rdb) = torch.func.jvp(backward, (u, g, b, dz), (ru, rg, rb, rdz))

    machine = Machine()
    room = machine.room
    statistics = machine.given(mean), machine.given(inverse)
    row = [room(1, size[1]) for _ in range(6)]
    t = Trace(
        machine.given(u), room(*size), room(*size), room(*size), machine.given(dz), room(*size),
        statistics[0], row[0] if batch else statistics[1], row[1], row[2],
    )  # fmt: skip
    r = Tangent(
        machine.given(ru), room(*size), machine.given(rdz), room(*size), row[3], row[4], row[5]
    )
    norm = BatchNorm("g", "b", "m", "v", EPS, batch)
    layer = Layer(machine.table, Dense("w", None, 1, size[1], norm, 0), machine.zero, machine.one)
    at = [None, None, machine.given(g), machine.given(b)] if affine else [None] * 4
    along = [None, None, machine.given(rg), machine.given(rb)] if affine else [None] * 4
    rates = [None, None, *[machine.one.like(row[0])] * 2] if affine else [None] * 4
    layer.forward_norm(t, at)
    layer.backward_through_norm(t, at)
    layer.tangent_forward_norm(t, r, at, along, rates)
    layer.tangent_backward_through_norm(t, r, at, along, rates, moved=True)
    machine.run()
    for view, expected in (
        (t.z, z), (t.product_delta, du), (t.along, dg), (t.plain, db),
        (r.z, rz), (r.delta, rdu), (r.along, rdg), (r.plain, rdb),
    ):  # fmt: skip
        got = machine.read(view)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
