"""The fused kernels of this build and processor: instruction sets, and what their lanes are.

With FASTMETA_CUDA_ON_HOST=1 the CUDA kernels, executed on the host with their threads in an order
drawn from a seed; with FASTMETA_TEST_DEVICE=cuda those on a GPU, which test_fuzz.py alone knows.
"""

from __future__ import annotations

import os

import host_cuda
import pytest

from fastmeta import _C

DEVICE = os.environ.get("FASTMETA_TEST_DEVICE", "cpu")
ON_HOST = host_cuda.ON_HOST
FUSED = "fused-cuda-on-host" if ON_HOST else f"fused-{DEVICE}"
"""What results name."""

KERNELS = (
    {
        "seed-1": {"FASTMETA_CUDA_SEED": "1"},
        "seed-2-workspace": {"FASTMETA_CUDA_SEED": "2", "FASTMETA_CUDA_STORAGE": "workspace"},
    }
    if ON_HOST
    else {f"{n}-threads": {"FASTMETA_CUDA_THREADS": str(n)} for n in (32, 256)}
    | {"workspace": {"FASTMETA_CUDA_STORAGE": "workspace"}}
    if DEVICE == "cuda"
    else {
        f"{isa}-{engine}": {"FASTMETA_ISA": isa, "FASTMETA_ENGINE": engine}
        for isa in _C.instruction_sets()
        for engine in ("tasks", "features")
        if isa != "plain"
    }
    | {"plain": {"FASTMETA_ISA": "plain", "FASTMETA_ENGINE": ""}}
)
"""By a readable name, the environment in which that kernel is taken."""

ANCHORED = (
    [name for name in KERNELS if name.startswith((_C.instruction_sets()[0], "plain"))]
    if DEVICE == "cpu" and not ON_HOST
    else [*KERNELS]
)
"""Those that tests hold against autograd one by one: what this processor takes, and the plain one.

`tests/csrc/engines_agree.cpp` holds the kernels of all instruction sets against the plain one.
"""

cpu_only = pytest.mark.skipif(ON_HOST, reason="it is about the processor's kernels")
