"""Products of the CUDA kernels in float32 and TF32, executed on the host, beside float64."""

from __future__ import annotations

import ctypes

import compiling
import host_cuda
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")

SIZES = [(1, 1, 1), (5, 40, 7), (17, 9, 33), (16, 8, 32), (40, 40, 64), (3, 1, 100), (33, 2, 2)]
"""Rows, columns and depth."""
TURNED = [(False, False), (False, True), (True, False), (True, True)]
"""Whether the left and the right matrix lie column by column."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    result = tmp_path_factory.mktemp("products") / "products.so"
    host_cuda.run(
        *host_cuda.FLAGS, f"-I{compiling.CSRC}", "-shared", "-pthread", "-x", "c++",
        str(host_cuda.TWIN / "products.cu"), str(host_cuda.TWIN / "fibres.cpp"), "-o", str(result),
    )  # fmt: skip
    return ctypes.CDLL(str(result))


def packed(matrices: list[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor]:
    """Matrices one after another, rows an odd count apart, gaps no number; and their views."""
    numbers, views, offset = [], [], 0
    for matrix, turned in matrices:
        lies = matrix.T if turned else matrix
        apart = lies.shape[1] | 1
        padded = torch.full((lies.shape[0], apart), torch.nan)
        padded[:, : lies.shape[1]] = lies
        numbers.append(padded.flatten())
        views.append([offset, *matrix.shape, *([1, apart] if turned else [apart, 1])])
        offset += padded.numel()
    return torch.cat(numbers), torch.tensor(views, dtype=torch.int32)


def product(
    library: ctypes.CDLL, matrices: list[tuple[Tensor, bool]], tf32: bool, threads: int = 64
) -> Tensor:
    numbers, views = packed(matrices)
    out = torch.zeros(matrices[0][0].shape[0], matrices[1][0].shape[1])
    library.fastmeta_product(
        ctypes.c_void_p(numbers.data_ptr()), numbers.numel(), ctypes.c_void_p(views.data_ptr()),
        len(matrices) // 2, threads, int(tf32), ctypes.c_void_p(out.data_ptr()),
    )  # fmt: skip
    return out


def rounded(x: Tensor) -> Tensor:
    """To 11 bits; ties away from zero. Not of numbers below the normal ones."""
    mantissa, exponent = torch.frexp(x.double())
    whole = mantissa.sign() * torch.floor(mantissa.abs() * 2**11 + 0.5)
    return torch.where(x.isfinite(), torch.ldexp(whole, exponent - 11), x.double())


def test_operands_are_rounded_to_nearest_and_ties_away_from_zero(library) -> None:
    steps = torch.tensor([0, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**13, 3 * 2**12, 2**23 - 1])
    x = torch.cat([(1 + steps.double() / 2**23).float() * scale for scale in (1, -(2**40), 2e-30)])
    x = torch.cat([x, torch.tensor([0.0, torch.inf, -torch.inf])])
    one = torch.ones(1, 1)
    assert torch.equal(product(library, [(x[:, None], False), (one, False)], True)[:, 0].double(),
                       rounded(x))  # fmt: skip
    assert torch.equal(product(library, [(one, False), (x[None], False)], True)[0].double(),
                       rounded(x))  # fmt: skip
    assert rounded(x).ne(x.double()).sum() > 10
    # Also of the pattern that shared memory begins with, which rounding would carry to zero.
    missing = torch.tensor([[-1]], dtype=torch.int32).view(torch.float32)
    assert product(library, [(missing, False), (one, False)], True).isnan().all()


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("turned", TURNED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_exact_but_for_the_rounding_that_was_asked_for(
    size: tuple[int, int, int], turned: tuple[bool, bool], parts: int, threads: int, library
) -> None:
    rows, cols, depth = size
    matrices = []
    for part in range(parts):
        deep = depth + 3 * part
        matrices += [(torch.randn(rows, deep), turned[0]), (torch.randn(deep, cols), turned[1])]
    pairs = list(zip(matrices[::2], matrices[1::2], strict=True))
    sizes = sum(a.abs().double() @ b.abs().double() for (a, _), (b, _) in pairs)
    exact = sum(a.double() @ b.double() for (a, _), (b, _) in pairs)
    of_rounded = sum(rounded(a) @ rounded(b) for (a, _), (b, _) in pairs)
    assert isinstance(sizes, Tensor)
    terms = sum(a.shape[1] for (a, _), _ in pairs)
    sum_error = (terms + 1) * torch.finfo(torch.float32).eps * sizes
    full = product(library, matrices, False, threads)
    assert ((full - exact).abs() <= sum_error).all()
    found = product(library, matrices, True, threads)
    assert ((found - of_rounded).abs() <= sum_error).all()
    half = 2.0**-11
    assert ((found - exact).abs() <= (2 * half + half**2) * sizes + sum_error).all()
    assert not torch.equal(found, full)


def banks(library: ctypes.CDLL, left: list[int], right: list[int]) -> list[int]:
    """At each read of a warp, how many of its lanes read different numbers of one bank."""
    most = 1 << 10
    places = torch.full((32, most), -1, dtype=torch.int32)
    views = torch.tensor([left, right], dtype=torch.int32)
    count = library.fastmeta_reads(
        ctypes.c_void_p(views.data_ptr()), most, ctypes.c_void_p(places.data_ptr())
    )
    assert count > 0
    met = []
    for read in range(count):
        different = places[places[:, read] >= 0, read].unique()
        met.append(int((different % 32).bincount().max()))
    return met


@pytest.mark.parametrize("turned", TURNED, ids=str)
def test_lanes_meet_in_no_bank_at_any_odd_distance_of_rows(
    turned: tuple[bool, bool], library
) -> None:
    for apart in range(1, 65, 2):
        strides = [[1, apart] if each else [apart, 1] for each in turned]
        assert max(banks(library, [0, 16, 64, *strides[0]], [7, 64, 8, *strides[1]])) == 1
        for depth, most in ((8, 4), (16, 2), (24, 1)):
            met = banks(library, [0, 16, depth, *strides[0]], [7, depth, 8, *strides[1]])
            assert max(met) <= most
    even = [[1, 16] if each else [16, 1] for each in turned]
    assert max(banks(library, [0, 16, 64, *even[0]], [7, 64, 8, *even[1]])) > 1
