"""Steps of the CUDA kernels under torch's TF32 switch, executed on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import compiling
import oracle
import pytest
import torch
from mlps import examples, mlp
from torch import Tensor, nn

import fastmeta

pytestmark = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")


@pytest.fixture(autouse=True)
def _on_host(cuda_plays) -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def drawn() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    model = mlp(3, 40, 40, 4, activation=nn.Tanh())
    return model, [examples(3, n, model, True) for n in (5, 15)]


def results(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> list[Tensor]:
    out = fastmeta.maml_step(model, *data, inner_lr=0.1, executor="fused", **options)
    assert out.executor == "fused-cuda-on-host"
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("storage", ["shared", "workspace"])
def test_the_switch_rounds_the_next_step_and_no_other(form: str, storage: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", form)
    monkeypatch.setenv("FASTMETA_CUDA_STORAGE", storage)
    steps, layers = 5, 3
    model, data = drawn()
    exact = oracle.maml(
        model, oracle.split(*data), list(model.parameters()),
        rate=lambda name, step: 0.1, steps=steps,
    )  # fmt: skip
    wanted = [exact.loss, *exact.gradients]
    single = model.float()
    narrow = [(x.float(), y) for x, y in data]

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    plain = results(single, narrow, inner_steps=steps)
    torch.set_float32_matmul_precision("high")
    rounded = results(single, narrow, inner_steps=steps)
    torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, results(single, narrow, inner_steps=steps), plain))
    # As in test_fused.py, of sums of at most 40 terms.
    assert error(plain) <= layers * 2 * steps * 40**0.5 * torch.finfo(torch.float32).eps
    # Each product rounds two operands by half of 2^-10; a sum is as near, relatively, as its terms.
    assert error(rounded) <= layers * 2 * steps * 2.0**-10
    assert error(rounded) > 10 * error(plain)


def test_float64_is_never_rounded() -> None:
    model, data = drawn()
    plain = results(model, data)
    torch.set_float32_matmul_precision("high")
    assert all(map(torch.equal, results(model, data), plain))


def test_explain_names_what_products_are_in() -> None:
    model, data = drawn()
    assert "products in float64" in fastmeta.explain(model, *data)
    single, narrow = model.float(), [(x.float(), y) for x, y in data]
    assert "products in float32" in fastmeta.explain(single, *narrow)
    torch.set_float32_matmul_precision("high")
    assert "products in TF32" in fastmeta.explain(single, *narrow)
