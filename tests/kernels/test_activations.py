"""The activations: value and derivatives beside torch's, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from mlps import ACTIVATIONS
from torch import Tensor, nn
from triton_on_host import TASKS, Machine

from fastmeta.executors.fused.lowering import Dense

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

OPTIONS = {"leaky_relu": (0.2, 0.0), "elu": (0.7, 0.0), "softplus": (2.0, 1.0)}


def arguments(dtype: torch.dtype) -> Tensor:
    """Zero, steps on either side of it, very small ones, and ones far out: a row a task."""
    near = torch.linspace(-6, 6, 41, dtype=dtype)
    small = 10.0 ** torch.arange(-9, 0, dtype=dtype)
    far = torch.tensor([0.0, -30.0, 30.0, -80.0, 80.0], dtype=dtype)
    return torch.cat([near, small, -small, far]).expand(TASKS, 1, -1)


def derivatives(f: nn.Module, z: Tensor) -> list[Tensor]:
    """f, f' and f'' by autograd."""
    z = z.double().requires_grad_()
    found = [f(z)]
    for _ in range(2):
        last = found[-1]
        (next_one,) = torch.autograd.grad(
            last.sum() + 0 * z.sum(), z, create_graph=True, materialize_grads=True
        )
        found.append(next_one)
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_value_slope_and_curve(kind: str, dtype: torch.dtype) -> None:
    layer = Dense("w", None, 1, 1, None, [*ACTIVATIONS].index(kind), OPTIONS.get(kind, (0.0, 0.0)))
    machine = Machine()
    z = machine.given(arguments(dtype))
    ones = machine.one.like(z)
    value, slope, curve, unused = (machine.room(1, z.cols) for _ in range(4))
    machine.table.product("FORWARD", unused, ending=(z,), out2=value, layer=layer)
    machine.table.product("THROUGH", unused, ending=(ones, ones, z), out2=slope, layer=layer)
    machine.table.product(
        "THROUGH", unused, None, None, None, (None, None, z, ones, ones), curve, layer
    )
    machine.run(dtype)
    got = [machine.read(view).double() for view in (value, slope, curve)]
    expected = derivatives(ACTIVATIONS[kind], arguments(dtype))
    eps = torch.finfo(dtype).eps
    # Of the terms that a derivative is made of, none is much larger than 1, nor than z.
    size = [e.abs() for e in expected[:1]] + [arguments(dtype).double().abs().clamp(min=1)] * 2
    if kind.startswith("gelu"):
        size[0] = size[1]  # 1 + erf and 1 + tanh cancel far down
    for ours, theirs, of in zip(got, expected, size, strict=True):
        error, bound = (ours - theirs).abs(), 32 * eps * of + torch.finfo(dtype).tiny
        assert (error <= bound).all(), (error / bound).max()


def test_no_number_stays_none() -> None:
    for i in range(len(ACTIVATIONS)):
        layer = Dense("w", None, 1, 1, None, i, (1.0, 1.0))
        machine = Machine()
        z = machine.given(torch.full((1, 1), torch.nan))
        out = machine.room(1, 1)
        machine.table.product("FORWARD", out, ending=(z,), out2=out, layer=layer)
        machine.run()
        assert machine.read(out).isnan().all(), [*ACTIVATIONS][i]
