"""Products in float32, TF32 and bfloat16: what is rounded, and what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton_on_host  # noqa: F401

from fastmeta.kernels import convolve
from fastmeta.kernels.geometry import Convolution

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _switched_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


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
