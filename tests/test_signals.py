"""Signals during a compiled call: answered within it, whatever their handlers do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import interrupted
import pytest
import torch

from fastmeta.executors import call

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

STEPS, TASKS = 100, 3_000
"""A call of a second or so, for which a signal comes every 10 ms."""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("executor", ["fused", "layered"])
def test_an_interrupt_ends_a_long_call(executor: str, threads: int) -> None:
    """It would take many minutes. The next call is right."""
    command = [sys.executable, interrupted.__file__, executor, str(threads)]
    path = os.pathsep.join([str(Path(call.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def many_signals() -> Iterator[list[FrameType]]:
    """Those that arrive in a compiled step; their handler takes a step of its own each time."""
    frames: list[FrameType] = []
    model, few = interrupted.network("fused"), interrupted.tasks("fused", 40)
    expected = interrupted.gradient(model, few, 1, "fused")

    def handle(signum: int, frame: FrameType | None) -> None:
        if frame is None or frame.f_code is not call.run.__code__:
            return
        frames.append(frame)
        found = interrupted.gradient(model, few, 1, "fused")
        assert all(map(torch.equal, found, expected))

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        yield frames
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_that_returns_changes_nothing(threads: int, many_signals) -> None:
    model, data = interrupted.network("fused"), interrupted.tasks("fused", TASKS)
    torch.set_num_threads(threads)
    try:
        found = interrupted.gradient(model, data, STEPS, "fused")
    finally:
        torch.set_num_threads(1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(many_signals) > 1, "no signal was handled while the step computed"
    expected = interrupted.gradient(model, data, STEPS, "fused")
    assert all(map(torch.equal, found, expected))


def test_a_call_on_another_thread_leaves_signals_to_the_main_one(many_signals) -> None:
    model, data = interrupted.network("fused"), interrupted.tasks("fused", TASKS)
    found: list[list[torch.Tensor]] = []
    thread = threading.Thread(
        target=lambda: found.append(interrupted.gradient(model, data, STEPS, "fused"))
    )
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not many_signals
    expected = interrupted.gradient(model, data, STEPS, "fused")
    assert all(map(torch.equal, found[0], expected))
