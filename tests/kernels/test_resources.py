"""Every kernel compiled ahead: it fits the architecture, and no register is spilt.

A kernel knows an image's size only when it runs, and its tiles are of a short list: so this holds
for every network, as far as its images fit into the GPU's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 only")

SCRIPT = Path(__file__).parent.parent / "compile_kernels.py"

SHARED = 48 << 10
"""Bytes that a block has on every architecture without asking."""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_and_spill_nothing(capability: int) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {kernel["kernel"] for kernel in found} == {
        "convolve_kernel", "weight_gradient_kernel", "statistics_kernel", "forward_kernel",
        "sums_kernel", "backward_kernel", "moved_kernel", "tangent_kernel",
    }  # fmt: skip
    for kernel in found:
        assert kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        # All of a block's threads find registers: there are 65,536, handed out by eights.
        assert -(-kernel["registers"] // 8) * 8 * kernel["warps"] * 32 <= 65536, kernel
