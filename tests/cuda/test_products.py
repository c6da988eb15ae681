"""Products of the CUDA kernels in float32 and TF32, executed on the host, beside float64."""

from __future__ import annotations

import ctypes

import compiling
import host_cuda
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")

SIZES = [
    (1, 1, 1), (5, 40, 7), (17, 9, 33), (16, 8, 32), (40, 40, 64), (3, 1, 100), (33, 2, 2),
    (10, 40, 40), (40, 40, 10), (4, 6, 9),
]  # fmt: skip
"""Rows, columns and depth."""
BANKS = 32
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


def apart(cols: int, float4: bool = True) -> int:
    """From one row to the next: csrc/network.h, `Rows`."""
    if not float4:
        return cols | 1
    return cols if cols < 2 else 4 * (-(-cols // 4) | 1)


def packed(matrices: list[tuple[Tensor, bool]], float4: bool) -> tuple[Tensor, Tensor]:
    """Matrices one after another, gaps no number; and their views."""
    numbers, views, offset = [], [], 0
    for matrix, turned in matrices:
        lies = matrix.T if turned else matrix
        distance = apart(lies.shape[1], float4)
        padded = torch.full((lies.shape[0], distance), torch.nan)
        padded[:, : lies.shape[1]] = lies
        gap = torch.full((-padded.numel() % 4 if float4 else 0,), torch.nan)
        numbers += [padded.flatten(), gap]
        views.append([offset, *matrix.shape, *([1, distance] if turned else [distance, 1])])
        offset += padded.numel() + gap.numel()
    return torch.cat(numbers), torch.tensor(views, dtype=torch.int32)


def product(
    library: ctypes.CDLL, matrices: list[tuple[Tensor, bool]], tf32: bool, threads: int = 64,
    float4: bool = True,
) -> Tensor:  # fmt: skip
    numbers, views = packed(matrices, float4)
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
    one_by_one = product(library, matrices, False, threads, float4=False)
    assert ((one_by_one - exact).abs() <= sum_error).all()
    found = product(library, matrices, True, threads)
    assert ((found - of_rounded).abs() <= sum_error).all()
    half = 2.0**-11
    assert ((found - exact).abs() <= (2 * half + half**2) * sizes + sum_error).all()
    assert not torch.equal(found, full)


NOWHERE = -1
Read = tuple[list[int], int]
"""Where the 32 lanes of a warp read at a time, or `NOWHERE`, and how many numbers each."""


def reads(
    library: ctypes.CDLL, size: tuple[int, int, int], turned: tuple[bool, bool], *,
    distance: int | None = None, tf32: bool = False, threads: int = 32,
) -> list[Read]:  # fmt: skip
    """Of all warps of a block, of two matrices behind each other."""
    most = 1 << 11
    found = torch.zeros((threads, most, 2), dtype=torch.int32)
    rows, cols, depth = size
    views, offset = [], 0
    for shape, turn in zip([(rows, depth), (depth, cols)], turned, strict=True):
        lies = shape[::-1] if turn else shape
        stride = distance or apart(lies[1])
        views.append([offset, *shape, *([1, stride] if turn else [stride, 1])])
        offset += -(-lies[0] * stride // 4) * 4
    given = torch.tensor(views, dtype=torch.int32)
    count = library.fastmeta_reads(
        ctypes.c_void_p(given.data_ptr()), int(tf32), threads, most,
        ctypes.c_void_p(found.data_ptr()),
    )  # fmt: skip
    assert count > 0
    result = []
    for warp in found[:, :count].split(32):
        for lanes in warp.unbind(1):
            taking = lanes[:, 1] > 0
            if taking.any():
                (width,) = set(lanes[taking, 1].tolist())
                result.append((lanes[:, 0].where(taking, NOWHERE).tolist(), width))
    return result


def meeting(places: list[int], width: int) -> int:
    """How many different ones of these lie in one bank."""
    banks = [place // width % (BANKS // width) for place in set(places) - {NOWHERE}]
    return max(map(banks.count, banks), default=0)


def wavefronts(places: list[int], width: int) -> int:
    """How often shared memory is read for a warp's read of one or four numbers a lane.

    Of four, a quarter of the lanes at a time; half of them, where two lanes whose numbers differ
    in the lowest bit, or any two that differ in the next, read the same (NVIDIA says so of compute
    capability 7).
    """
    if width == 1:
        return meeting(places, 1)
    shared = any(all(places[n] == places[n ^ bit] for n in range(32)) for bit in (1, 2))
    each = 16 if shared else 8
    return sum(meeting(places[n : n + each], width) for n in range(0, 32, each))


FORWARD, INPUT, WEIGHT = (False, True), (False, False), (True, False)
"""x W', delta W and delta' x, where rows lie as in `csrc/network.cpp`."""


@pytest.mark.parametrize("turned", [FORWARD, INPUT, WEIGHT], ids=str)
def test_reads_of_four_numbers_meet_in_no_bank(turned: tuple[bool, bool], library) -> None:
    for size in ((64, 64, 8), (8, 32, 64)):
        for distance in range(68, 200, 8):
            found = reads(library, size, turned, distance=distance)
            assert {width for _, width in found} == {4}
            assert {wavefronts(*each) for each in found} == {2}
    even = reads(library, (64, 64, 8), turned, distance=64)
    assert (max(wavefronts(*each) for each in even) > 2) == (turned != WEIGHT)


@pytest.mark.parametrize("turned", TURNED, ids=str)
def test_lanes_of_warp_tiles_meet_only_where_the_sides_differ(
    turned: tuple[bool, bool], library
) -> None:
    differ = turned[0] == turned[1]
    for distance in range(68, 200, 8):
        for depth in (8, 16, 24, 64):
            found = reads(library, (16, 8, depth), turned, distance=distance, tf32=True)
            met = [wavefronts(*each) for each in found]
            # Of each half of an instruction's depth: two of the left side, one of the right.
            assert met == [1, 1, 2 if differ else 1] * (len(met) // 3)


@pytest.mark.parametrize(
    ("size", "turned", "threads", "instructions", "read"),
    [
        ((10, 40, 40), FORWARD, 128, 96, 280),
        ((10, 40, 40), INPUT, 128, 96, 240),
        ((40, 40, 10), WEIGHT, 128, 80, 190),
        ((10, 1, 40), FORWARD, 128, 24, 55),
        ((150, 10, 64), FORWARD, 256, 512, 1856),
        ((150, 64, 10), INPUT, 256, 494, 836),
        ((10, 64, 150), WEIGHT, 256, 456, 1350),
    ],
    ids=str,
)
def test_counts_are_those_of_the_document(
    size: tuple[int, int, int], turned: tuple[bool, bool], threads: int, instructions: int,
    read: int, library,
) -> None:  # fmt: skip
    """docs/design.md, "The CUDA engine"."""
    found = reads(library, size, turned, threads=threads)
    assert (len(found), sum(wavefronts(*each) for each in found)) == (instructions, read)
