"""A short step stays on its caller's thread, a long one does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import host_cuda
import pytest
import threads_started

from fastmeta.executors import call

pytest.importorskip("fastmeta._C", reason="the extension was not built here")


@pytest.mark.skipif(host_cuda.ON_HOST, reason="it is about the processor's kernels")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("executor", ["fused", "layered"])
def test_a_second_thread_is_started_for_a_long_step_alone(executor: str) -> None:
    path = os.pathsep.join([str(Path(call.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, threads_started.__file__, executor],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    before, short, long = json.loads(run.stdout)
    assert short == before
    assert long > before
