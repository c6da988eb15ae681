"""The two engines of the fused step: shapes that only padding or long sums meet, and the choice."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, KERNELS, cpu_only

from fastmeta import _C
from fastmeta.executors.fused.lowering import NONE

STEPS = 2


@pytest.fixture(params=ANCHORED)
def kernel(request, monkeypatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def examples(tasks: int, count: int, model: nn.Sequential) -> tuple[Tensor, Tensor]:
    first, last = model[0], model[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return torch.randn(tasks, count, first.in_features), torch.rand(tasks, count, last.out_features)


@pytest.mark.parametrize(
    ("widths", "counts"),
    [
        ((1, 1), (1, 1)),
        ((3, 17, 1), (17, 2)),
        ((17, 33, 3), (3, 33)),
        ((33, 1, 17), (16, 17)),
        # Sums longer than a strip of any instruction set may be, for more rows than wait at a time.
        ((3, 1100, 65, 2), (57, 61)),
        # Gram matrices of long rows, which fill no last vector, and few columns.
        ((307, 20, 3), (10, 37)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shapes(
    widths: tuple[int, ...], counts: tuple[int, int], dtype: torch.dtype, kernel: str
) -> None:
    model = mlp(*widths).double()
    data = [tuple(t.double() for t in examples(2, count, model)) for count in counts]
    reference = oracle.maml(
        model, oracle.split(*data), list(model.parameters()),
        rate=lambda name, step: 0.1, steps=STEPS, loss_fn=F.mse_loss,
    )  # fmt: skip
    model.to(dtype)
    support, query = (tuple(t.to(dtype) for t in pair) for pair in data)
    out = fastmeta.maml_step(
        model, support, query, inner_lr=0.1, inner_steps=STEPS, loss_fn=F.mse_loss, executor="fused"
    )
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    # Each layer's sums, forward and back, at every step.
    length = max(*widths, *counts) ** 0.5
    tolerance = 3 * len(widths) * (STEPS + 1) * length * torch.finfo(dtype).eps
    for found, wanted in zip(got, reference.gradients, strict=True):
        assert (found - wanted).norm() <= tolerance * max(1, wanted.norm())


def step(widths: tuple[int, ...], tasks: int, engine: str = "") -> _C.FusedStep:
    """The kernel of five second-order steps on 10 support and 10 query examples, float32."""
    has = [True, True, False, False]
    layers = [
        (widths[i], widths[i + 1], 0, 0.0, 0.0, 0, 0.0, has, has, (i - 1, NONE, False))
        for i in range(len(widths) - 1)
    ]
    flags = (True, False, False, False)
    return _C.FusedStep(
        layers, 1, 0.0, -100, False, 10, 10, 5, *flags, 0.0, False, tasks, "", engine, "", ""
    )


def test_few_tasks_and_wide_layers_go_over_features() -> None:
    if _C.instruction_sets() == ["plain"]:
        pytest.skip("there are no lanes here")
    assert step((1, 40, 40, 1), 1).engine == "features"
    assert step((1, 40, 40, 1), 1000).engine == "tasks"
    assert step((784, 128, 128, 10), 1).engine == "features"
    assert step((784, 128, 128, 10), 32).engine == "features"
    for engine in ("tasks", "features"):
        assert step((1, 40, 40, 1), 25, engine).engine == engine


@cpu_only
def test_an_engine_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_ENGINE", "steam")
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    with pytest.raises(ValueError, match="FASTMETA_ENGINE: 'steam'"):
        fastmeta.maml_step(nn.Linear(3, 2), *data, executor="fused")
