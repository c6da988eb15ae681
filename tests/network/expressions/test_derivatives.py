"""Drawn functions as expressions: value, slope and curvature are autograd's, at kinks too."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmeta.network.expressions.derivatives import gradients, jet
from fastmeta.network.expressions.expression import (
    Expression,
    constant,
    evaluate,
    operate,
    variable,
)
from fastmeta.network.expressions.operations import OPERATIONS
from fastmeta.network.expressions.tracing import EXAMPLES, Symbol, Trace

DRAWN = int(os.environ.get("FASTMETA_FUZZ", "0")) * 5 // 2 or 200
Z = variable("z")
POINTS = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -3.0, 6.0, 1e-3, -1e-3, 20.5, math.inf, -math.inf],
    dtype=torch.float64,
)

Function = Callable[[Tensor], Tensor]


def traced(function: Function) -> Expression:
    return function(Symbol(Z, (EXAMPLES,), Trace(torch.float64))).expression  # pyright: ignore


def derivative(of: Expression, by: Expression) -> Expression:
    """By reverse mode."""
    (found,) = gradients(of, [by])
    return constant(0.0) if found is None else found


def derivatives(expression: Expression, z: Tensor) -> list[Tensor]:
    slope = derivative(expression, Z)
    backward = evaluate([expression, slope, derivative(slope, Z)], {"z": z}, z)
    forward = evaluate(jet(expression, Z), {"z": z}, z)
    for a, b in zip(backward, forward, strict=True):
        scale = 1 + a.abs() + sum(each.abs() for each in backward)
        assert ((a - b).abs() <= 1e-9 * scale)[scale.isfinite() & (scale < 1e8)].all()
    return [each.expand_as(z) for each in forward]


def by_autograd(function: Function, z: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    value = function(z).expand_as(z)
    found = [value]
    for _ in range(2):
        (slope,) = (
            torch.autograd.grad(found[-1].sum(), z, create_graph=True, allow_unused=True)
            if found[-1].requires_grad
            else (None,)
        )
        found.append(torch.zeros_like(z) if slope is None else slope)
    return [each.detach() for each in found]


SMOOTH: list[Function] = [
    torch.exp, torch.tanh, torch.sigmoid, torch.sin, torch.cos, torch.erf, torch.neg,
    F.softplus, torch.square, F.silu, F.mish, F.gelu, torch.expm1, F.logsigmoid, torch.cosh,
    lambda z: F.gelu(z, approximate="tanh"), lambda z: 1 / (1 + z * z), lambda z: (1 + z * z).log(),
    lambda z: (1 + z * z).sqrt(), lambda z: torch.log1p(z * z), lambda z: (1 + z * z) ** -1.5,
]  # fmt: skip
KINKED: list[Function] = [
    torch.relu, torch.abs, F.leaky_relu, F.elu, F.celu, F.selu, F.hardtanh, F.relu6, F.hardswish,
    F.softsign, torch.sign, lambda z: z.clamp(-1, 1), lambda z: z.clamp(min=0.5),
    lambda z: torch.where(z > 1, z * z, 2 * z - 1), lambda z: z.clamp(max=2.0),
    lambda z: torch.maximum(z, -z), lambda z: torch.minimum(z * z, z), lambda z: z.pow(3),
    lambda z: torch.xlogy(z, 2 + z * z),
]  # fmt: skip


def ids(functions: list[Function]) -> list[str]:
    return [f"{i}-{getattr(f, '__name__', '')}".replace("<lambda>", "") for i, f in
            enumerate(functions)]  # fmt: skip


@pytest.mark.parametrize("function", [*SMOOTH, *KINKED], ids=ids([*SMOOTH, *KINKED]))
def test_value_slope_and_curvature(function: Function) -> None:
    points = torch.cat([POINTS, torch.randn(50, dtype=torch.float64)])
    ours_and_theirs = zip(
        derivatives(traced(function), points), by_autograd(function, points), strict=True
    )
    for order, (ours, theirs) in enumerate(ours_and_theirs):
        finite = points.isfinite()
        if order == 2 and function in (F.elu, F.celu, F.selu):
            finite &= points != 0  # torch's slope there is the left one, its curvature the right
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("function", [*SMOOTH, *KINKED], ids=ids([*SMOOTH, *KINKED]))
def test_values_at_infinity(function: Function) -> None:
    points = POINTS[:-1] if function is F.hardswish else POINTS  # torch's of -inf is NaN
    (value,) = evaluate([traced(function)], {"z": points}, points)
    torch.testing.assert_close(value.expand_as(points), function(points), equal_nan=True)


leaves = st.one_of(
    st.just(lambda z: z),
    st.floats(-3, 3).map(lambda number: lambda z: z * 0 + number),
)


def composed(inner: st.SearchStrategy[Function]) -> st.SearchStrategy[Function]:
    def unary(pair: tuple[Function, Function]) -> Function:
        outer, of = pair
        return lambda z: outer(of(z))

    def binary(parts: tuple[str, Function, Function]) -> Function:
        name, a, b = parts
        combine = {
            "add": lambda x, y: x + y, "multiply": lambda x, y: x * y,
            "subtract": lambda x, y: x - y, "divide": lambda x, y: x / (1 + y * y),
            "scaled": lambda x, y: 0.7 * x - y * 1.3,
        }[name]  # fmt: skip
        return lambda z: combine(a(z), b(z))

    names = st.sampled_from(["add", "multiply", "subtract", "divide", "scaled"])
    return st.one_of(
        st.tuples(st.sampled_from(SMOOTH), inner).map(unary),
        st.tuples(names, inner, inner).map(binary),
    )


@settings(
    max_examples=DRAWN, deadline=None, phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(function=st.recursive(leaves, composed, max_leaves=6), seed=st.integers(0, 2**31))
def test_drawn_functions(function: Function, seed: int) -> None:
    points = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = derivatives(traced(function), points)
    theirs = by_autograd(function, points)
    # The scale of what is added up, of which rounding is a part: all derivatives' together.
    scale = sum(each.abs() for each in theirs) + 1
    for found, expected in zip(ours, theirs, strict=True):
        known = scale.isfinite() & (scale < 1e8)
        assert ((found - expected).abs() <= 1e-9 * scale)[known].all()


def test_equal_expressions_are_one() -> None:
    first, second = (traced(lambda z: torch.sin(30 * z) * z) for _ in range(2))
    assert first is second
    assert traced(lambda z: torch.sin(31 * z) * z) is not first


# trigamma is itself a second derivative, which no user's formula has.
DERIVED = [n for n, o in OPERATIONS.items() if any(o.derivatives) and n != "trigamma"]


@pytest.mark.parametrize("name", DERIVED)
def test_derivatives_of_the_table_by_differences(name: str) -> None:
    operation = OPERATIONS[name]
    point = torch.tensor([0.3, 0.8, 1.7][: operation.arguments], dtype=torch.float64)
    inputs = [variable(("x", i)) for i in range(operation.arguments)]
    of = operate(name, *inputs)
    for i, (each, known) in enumerate(zip(inputs, operation.derivatives, strict=True)):
        values = {x.value: point[j] for j, x in enumerate(inputs)}
        (found,) = evaluate([derivative(of, each)], values, point)
        step = torch.zeros_like(point)
        step[i] = 1e-6
        ends = [operation.compute(*(point + sign * step)) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-6 if known is not None else 0 * found
        torch.testing.assert_close(found.reshape(()), expected.reshape(()), rtol=1e-6, atol=1e-8)
