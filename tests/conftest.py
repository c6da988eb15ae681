"""Shared fixtures: forms of the general path to choose, and uninitialised memory made visible."""

from __future__ import annotations

import os

# Read when Triton is first imported, by whoever that is. 0 leaves its kernels to a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import host_cuda
import pytest
import torch

import fastmeta
from fastmeta.executors.fused import cuda
from fastmeta.plan import cost, snapshot

if cuda.on_host():
    # So much that sizes beyond any device's are tried too.
    os.environ.setdefault("FASTMETA_CUDA_SHARED", str(64 << 20))
    host_cuda.register()

torch.set_num_threads(1)
fastmeta.set_cliff_warnings(False)  # tests/plan/test_cliff.py turns them on


@pytest.fixture(autouse=True)
def _seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _uninitialised_memory_is_nan():
    """What nothing wrote is seen: torch fills fresh tensors with NaN in deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force_form(monkeypatch):
    """`force_form("loop")` makes the general path take that form, with chunks of 2 for vmap."""

    def force(form: str) -> None:
        def choose(profile, sizes, unavailable):
            assert form not in unavailable, unavailable[form]
            return cost.Choice(form, 2, "forced")

        snapshot.clear_cache()
        monkeypatch.setattr(cost, "choose", choose)

    return force
