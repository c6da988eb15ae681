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
from fastmeta.executors.base import NotSupported, Offer
from fastmeta.executors.every import EXECUTORS
from fastmeta.executors.generic.forms import Loop
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading
from fastmeta.plan import selection, snapshot

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
        monkeypatch.setattr(selection, "EXECUTORS", left)

    return leave


@pytest.fixture
def without(only):
    """`without("layered-cpu")` takes that executor away, where it is there."""
    return lambda *names: only(*(e.name for e in EVERY if e.name not in names))


@pytest.fixture
def cuda_plays(monkeypatch) -> None:
    """The CUDA kernels, executed on the host, compute the fused step."""
    snapshot.clear_cache()
    monkeypatch.setattr(selection, "EXECUTORS", host_cuda.played(selection.EXECUTORS))


@pytest.fixture
def triton_plays(monkeypatch) -> None:
    """Triton's kernels, in its interpreter, compute convolutions."""
    pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 only")
    import triton_on_host

    snapshot.clear_cache()
    monkeypatch.setattr(selection, "EXECUTORS", triton_on_host.played(selection.EXECUTORS))
    monkeypatch.setattr("fastmeta.executors.layers.many._at_once", triton_on_host.lists_at_once)


EVERY = [*EXECUTORS]
"""As they were before any test took some away."""


class _LoopOfOne(Loop):
    """The loop for a single task, over which `vmap` has nothing to map."""

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        if problem.tasks.tasks > 1:
            raise NotSupported("another form is forced")
        return super().make_offer(reading, problem)


@pytest.fixture
def force_form(only, monkeypatch):
    """`force_form("loop")` leaves that form alone, with chunks of 2 for vmap."""

    def force(form: str) -> None:
        monkeypatch.setattr("fastmeta.executors.generic.cost.chunk_size", lambda *_: 2)
        only(fused_kernels.FUSED if form == "fused" else form)
        if form == "vmap":
            monkeypatch.setattr(selection, "EXECUTORS", [*selection.EXECUTORS, _LoopOfOne()])

    return force
