"""The programs of tests/csrc: kernels against the plain ones, the pool under callers and forks.

`make sanitize` runs the same ones under the compiler's sanitizers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import compiling
import pytest


@pytest.mark.parametrize(
    ("name", "count"), [("engines_agree", 960), ("conv_agrees", 240), ("pool_is_shared", 100)]
)
def test_program(name: str, count: int, units: list[Path], tmp_path: Path) -> None:
    if name == "pool_is_shared" and not Path("/proc/self/task").exists():
        pytest.skip("needs Linux's /proc to count threads")
    program = compiling.link_program(name, units, tmp_path, "-O2")
    run = subprocess.run([program, str(count)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
