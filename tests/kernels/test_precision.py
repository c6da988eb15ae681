"""Products in float32, TF32 and bfloat16: which one torch's switches ask for, and their sums."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
import triton_on_host  # noqa: F401

from fastmeta.kernels import convolve
from fastmeta.kernels.geometry import Convolution
from fastmeta.kernels.precision import of_products

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _switched_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")]
)
def test_the_older_switch(setting: str, precision: str) -> None:
    torch.set_float32_matmul_precision(setting)
    assert of_products(torch.float32) == precision
    assert of_products(torch.float64) == "ieee"


@pytest.mark.parametrize(
    ("switches", "precision"),
    [
        (types.SimpleNamespace(fp32_precision="tf32"), "tf32"),
        (types.SimpleNamespace(fp32_precision="none"), "ieee"),
        (types.SimpleNamespace(allow_tf32=True), "tf32"),  # torch before 2.9
        (types.SimpleNamespace(allow_tf32=False), "ieee"),
    ],
)
def test_the_newer_switch_and_torch_without_it(switches, precision: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", switches)
    assert of_products(torch.float32) == precision


def test_where_the_older_switch_has_no_word_for_the_newer(monkeypatch) -> None:
    def mixed() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision="tf32"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert of_products(torch.float32) == "tf32"


def test_bfloat16_rounds_what_is_multiplied_and_not_the_sum() -> None:
    """Of numbers that bfloat16 has, 4,096 products are exact in float32 and would not be in it."""
    torch.set_float32_matmul_precision("medium")
    pixel = Convolution((1, 1), (0, 0), (1, 1), 1)
    x = torch.randint(-8, 9, (1, 2, 4096, 1, 1)).float()
    w = torch.randint(-8, 9, (1, 3, 4096, 1, 1)).float()
    y = convolve.convolve(pixel, [(x, w)], (1, 1))
    exact = x.flatten(2) @ w.flatten(2).mT
    assert torch.equal(y.flatten(2), exact)
    near = 1 + 2.0**-10  # which bfloat16 does not tell from 1
    assert torch.equal(convolve.convolve(pixel, [(near * x, w)], (1, 1)), y)
