"""The losses beside autograd: value, derivative, and its tangent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_on_host import TASKS, Machine

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # by torch.func
]

Each = Callable[[Tensor, Tensor, Tensor], Tensor]


def huber(z: Tensor, y: Tensor, knee: float) -> Tensor:
    size = (z - y).abs()
    return torch.where(size < knee, 0.5 * size**2, knee * (size - 0.5 * knee))


LOSSES: list[tuple[str, float, Each]] = [
    ("cross_entropy", 0.0, lambda z, y, c: -(y * F.log_softmax(z, -1))),
    ("mse", 1.0, lambda z, y, c: (z - y) ** 2),
    ("bce", 1.0, lambda z, y, c: c * F.softplus(z) - z * y),
    ("huber", 0.5, lambda z, y, c: huber(z, y, 0.5)),
    ("smooth_l1", 0.5, lambda z, y, c: huber(z, y, 0.5) / 0.5),
    ("l1", 1.0, lambda z, y, c: (z - y).abs()),
]


@pytest.mark.parametrize("size", [(1, 1), (33, 5), (3, 65)], ids=str)
@pytest.mark.parametrize("kind", range(len(LOSSES)), ids=[name for name, _, _ in LOSSES])
def test_value_derivative_and_tangent(kind: int, size: tuple[int, int]) -> None:
    _, option, each = LOSSES[kind]
    z, rz, factor = (torch.randn(TASKS, *size, dtype=torch.float64) for _ in range(3))
    y = torch.rand(TASKS, *size, dtype=torch.float64)
    weight, missing = torch.rand(TASKS, size[0], 1).double(), torch.rand(TASKS, 1, 1).double()
    if kind == 0:
        y = y / y.sum(-1, keepdim=True)

    def loss(z: Tensor) -> Tensor:
        return (weight * each(z, y, factor)).sum((1, 2))

    gradient = torch.func.grad(lambda z: loss(z).sum())
    derivative, tangent = torch.func.jvp(gradient, (z,), (rz,))

    machine = Machine()
    value, softmax, delta, moved = machine.room(1, 1), *(machine.room(*size) for _ in range(3))
    views = {
        "PREDICTION": machine.given(z), "TARGET": machine.given(y),
        "WEIGHT": machine.given(weight), "FACTOR": machine.given(factor),
        "MISSING": machine.given(missing), "SOFTMAX": softmax,
    }  # fmt: skip
    machine.table.loss(
        "LOSS_FORWARD", kind, option, delta, **views, WORTH=machine.one, VALUE=value, OUT=delta
    )  # fmt: skip
    machine.table.loss(
        "LOSS_TANGENT", kind, option, delta, **views, TANGENT=machine.given(rz), OUT=moved
    )  # fmt: skip
    machine.run()
    for got, expected in (
        (value, (loss(z)[:, None, None] + missing)), (delta, derivative), (moved, tangent),
    ):  # fmt: skip
        torch.testing.assert_close(machine.read(got), expected, rtol=1e-11, atol=1e-12)


def test_a_derivative_is_weighed_by_what_its_step_is_worth() -> None:
    machine = Machine()
    z, y = (machine.given(torch.randn(TASKS, 3, 2)) for _ in range(2))
    deltas = [machine.room(3, 2) for _ in range(2)]
    for delta, worth in zip(deltas, (1.0, 0.25), strict=True):
        machine.table.loss(
            "LOSS_FORWARD", 1, 1.0, delta, PREDICTION=z, TARGET=y,
            WEIGHT=machine.one.throughout(3, 1), FACTOR=machine.one.like(z), MISSING=machine.zero,
            WORTH=machine.given(torch.full((1, 1), worth)), SOFTMAX=z, VALUE=machine.room(1, 1),
            OUT=delta,
        )  # fmt: skip
    machine.run()
    torch.testing.assert_close(machine.read(deltas[1]), 0.25 * machine.read(deltas[0]))
