"""Shared fixtures: forms of the general path to choose, and uninitialised memory made visible."""

from __future__ import annotations

import os

# Read when Triton is first imported, by whoever that is. 0 leaves its kernels to a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_kernels
import host_cuda
import pytest
import torch

import fastmeta
from fastmeta.executors.every import EXECUTORS
from fastmeta.plan import snapshot

if host_cuda.ON_HOST:
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
def only(monkeypatch):
    """`only("loop")` leaves that executor alone, and `only("loop", "vmap")` these."""

    def leave(*names: str) -> None:
        snapshot.clear_cache()
        left = [executor for executor in EVERY if executor.name in names]
        assert len(left) == len(names), names
        monkeypatch.setattr("fastmeta.plan.selection.EXECUTORS", left)

    return leave


EVERY = [*EXECUTORS]
"""As they were before any test took some away."""


@pytest.fixture
def force_form(only, monkeypatch):
    """`force_form("loop")` makes the general path take that form, with chunks of 2 for vmap."""

    def force(form: str) -> None:
        monkeypatch.setattr("fastmeta.executors.generic.cost.chunk_size", lambda *_: 2)
        only(fused_kernels.FUSED if form == "fused" else form)

    return force
