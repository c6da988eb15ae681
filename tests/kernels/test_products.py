"""Products and what is done to their sums, beside torch; sizes cross the edges of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_on_host import TASKS, Machine

from fastmeta.executors.fused.lowering import Dense

SIZES = [(1, 1, 1), (5, 33, 40), (33, 3, 65)]
"""Rows, columns and depth: tiles are 32."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # by torch.func
]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def drawn(*size: int) -> Tensor:
    return torch.randn(TASKS, *size, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_products_with_a_scale_turned_views_and_an_addend(size: tuple[int, int, int]) -> None:
    rows, cols, depth = size
    machine = Machine()
    a, b = drawn(rows, depth), drawn(cols, depth)
    a2, b2, scale = drawn(rows, 7), drawn(7, cols), drawn(7, cols)
    before = drawn(rows, cols)
    out = machine.given(before)
    machine.table.product(
        "ADD", out, (machine.given(a), machine.given(b).turned),
        (machine.given(a2), machine.given(b2)), machine.given(scale),
    )  # fmt: skip
    machine.run()
    close(machine.read(out), before + a @ b.mT + a2 @ (b2 * scale))


def test_without_a_product_zeros_are_set() -> None:
    machine = Machine()
    out = machine.room(3, 40)
    machine.table.product("SET", out)
    machine.run()
    close(machine.read(out), drawn(3, 40) * 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_step_of_descent_pulled_to_its_anchor(size: tuple[int, int, int]) -> None:
    rows, cols, depth = size
    machine = Machine()
    a, b, p, anchor, rate = (
        drawn(depth, rows), drawn(depth, cols), *(drawn(rows, cols) for _ in range(3)),
    )  # fmt: skip
    place = machine.given(p)
    ending = (place, machine.given(anchor), machine.given(rate))
    gradient = machine.given(a).turned, machine.given(b)
    machine.table.product("DESCEND", place, gradient, ending=ending, prox=0.3)
    machine.run()
    close(machine.read(place), p - rate * (a.mT @ b + 0.3 * (p - anchor)))


@pytest.mark.parametrize("prox", [0.0, 0.3])
def test_a_hessian_product_is_subtracted_and_the_anchor_gets_its_part(prox: float) -> None:
    machine = Machine()
    a, b, before, anchor = drawn(33, 4), drawn(4, 35), drawn(33, 35), drawn(33, 35)
    rate = drawn(1, 1)
    out, pulled = machine.given(before), machine.given(anchor)
    machine.table.product(
        "SUBTRACT", out, (machine.given(a), machine.given(b)),
        ending=(None, None, machine.given(rate).like(out)), out2=pulled, prox=prox,
    )  # fmt: skip
    machine.run()
    close(machine.read(out), before - prox * rate * before - a @ b)
    close(machine.read(pulled), anchor + prox * rate * before)


@pytest.mark.parametrize("each", [True, False])
def test_gradients_of_rates(each: bool) -> None:
    machine = Machine()
    a, b, p, anchor, cotangent = drawn(35, 5), drawn(5, 33), *(drawn(35, 33) for _ in range(3))
    out = machine.room(35, 33) if each else machine.room(1, 1)
    machine.table.product(
        "RATE_EACH" if each else "RATE_SUM", out if each else out.like(machine.given(p)),
        (machine.given(a), machine.given(b)), prox=0.3,
        ending=tuple(map(machine.given, (p, anchor, cotangent))),
    )  # fmt: skip
    machine.run()
    expected = -(a @ b + 0.3 * (p - anchor)) * cotangent
    close(machine.read(out), expected if each else expected.sum((1, 2), keepdim=True))


def test_the_four_rules_of_a_layer() -> None:
    """Forward, backward, and their tangents: of tanh(x W' + b), by autograd."""
    tanh = Dense("weight", "bias", 33, 35, activation=3)
    machine = Machine()
    x, w, b, v, vb = drawn(5, 33), drawn(35, 33), drawn(1, 35), drawn(35, 33), drawn(1, 35)
    rx, d, rd = drawn(5, 33), drawn(5, 35), drawn(5, 35)
    z, a, slope, rz, ra, rdelta = (machine.room(5, 35) for _ in range(6))
    weight, along = machine.given(w).turned, machine.given(v).turned
    given_x, given_rx = machine.given(x), machine.given(rx)
    table, one = machine.table, machine.one
    table.product(
        "FORWARD", z, (given_x, weight), None, None, (machine.given(b).repeated(5),), a, tanh
    )
    derivative = machine.given(d)
    eye = machine.given(torch.eye(5, dtype=torch.float64))
    table.product(
        "THROUGH", machine.room(5, 35), (eye, derivative), None, None, (None, None, z), slope, tanh
    )
    table.product(
        "THROUGH", rz, (given_rx, weight), (given_x, along), one.throughout(33, 35),
        (machine.given(vb).repeated(5), one.like(z), z), ra, tanh,
    )  # fmt: skip
    table.product(
        "THROUGH",
        rdelta,
        (eye, machine.given(rd)),
        None,
        None,
        (None, None, z, rz, derivative),
        layer=tanh,
    )
    machine.run()

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(x @ w.mT + b)

    def backward(z: Tensor, d: Tensor) -> Tensor:
        return torch.func.vjp(torch.tanh, z)[1](d)[0]

    value, tangent = torch.func.jvp(forward, (x, w, b), (rx, v, vb))
    before = x @ w.mT + b
    moved = rx @ w.mT + x @ v.mT + vb
    close(machine.read(a), value)
    close(machine.read(ra), tangent)
    close(machine.read(slope), backward(before, d))
    close(machine.read(rdelta), torch.func.jvp(backward, (before, d), (moved, rd))[1])
