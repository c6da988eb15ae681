"""No barrier of the CUDA kernels can be left out: without any one of them a number is wrong."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import compiling
import host_cuda
import pytest
import torch
from torch import Tensor

import fastmeta

pytestmark = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")

SITES = re.search(r"enum Site \{(.*?)\}", (compiling.CSRC / "cuda" / "engine.h").read_text(), re.S)
assert SITES is not None
NAMES = re.findall(r"k\w+", SITES[1])
SEEDS = range(12)


@pytest.fixture(scope="module")
def contract(tmp_path_factory) -> Callable[[], list[Tensor]]:
    """Every operation of the engine, each on what the one before wrote and over what it read."""
    result = tmp_path_factory.mktemp("contract") / "contract.so"
    host_cuda.run(
        *host_cuda.FLAGS, f"-I{compiling.CSRC}", "-shared", "-pthread", "-x", "c++",
        str(host_cuda.TWIN / "contract.cu"), str(host_cuda.TWIN / "fibres.cpp"), "-o", str(result),
    )  # fmt: skip
    run = ctypes.CDLL(str(result)).fastmeta_contract
    numbers = torch.linspace(-1, 1, 36, dtype=torch.float64)
    labels = torch.tensor([0, 4, 3, 2, 1, 9, 2])  # 3 is ignored, 9 is no class

    def call() -> list[Tensor]:
        out, sums = torch.zeros(35).double(), torch.zeros(200).double()
        run(*(ctypes.c_void_p(t.data_ptr()) for t in (numbers, labels, out, sums)))
        return [out, sums]

    return call


def sums_over_tasks() -> Callable[[], list[Tensor]]:
    """The gradients of one model, whose plan is found at the first call."""
    model = torch.nn.Linear(2, 2).double()
    data = [(torch.randn(20, 2, 2).double(), torch.randint(2, (20, 2))) for _ in "sq"]

    def call() -> list[Tensor]:
        out = fastmeta.maml_step(model, *data, inner_steps=0, executor="fused")
        return [*torch.autograd.grad(out.loss, list(model.parameters()))]

    return call


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def test_the_order_of_threads_changes_nothing(contract, monkeypatch) -> None:
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("FASTMETA_CUDA_SEED", str(seed))
        results.append(contract())
    assert all(same(results[0], other) for other in results)
    sums = results[0][1]
    a = torch.linspace(-1, 1, 36, dtype=torch.float64)[:35].view(7, 5)
    torch.testing.assert_close(sums[:35].view(7, 5), a.flip(1) + 1)
    torch.testing.assert_close(sums[50:99].view(7, 7), a @ a.T)
    torch.testing.assert_close(sums[110:117], a.sum(1))
    torch.testing.assert_close(sums[120:125], a.sum(0))
    torch.testing.assert_close(sums[130:137], a.square().sum().expand(7))
    weights = sums[180:187]  # six labels count, one of which is no class
    expected = torch.ones(7, dtype=torch.float64)
    expected[4], expected[1] = 0, float("nan")  # from the last to the first
    torch.testing.assert_close(weights, expected, equal_nan=True)
    assert torch.equal(sums[140:175].view(7, 5)[1], torch.tensor([0, 0, 0, 0, 1.0]).double())


@pytest.mark.parametrize("site", NAMES)
def test_without_this_barrier_a_number_is_wrong(site: str, contract, monkeypatch, request) -> None:
    run = contract
    if site == "kSlicesMade":
        request.getfixturevalue("cuda_plays")
        run = sums_over_tasks()
    reference = run()
    monkeypatch.setenv("FASTMETA_CUDA_SKIP", str(NAMES.index(site)))
    changed = 0
    for seed in SEEDS:
        monkeypatch.setenv("FASTMETA_CUDA_SEED", str(seed))
        changed += not same(run(), reference)
    assert changed > 0
