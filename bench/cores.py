"""One core for every contender, and the check that each uses no more."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def restrict(threads: int) -> None:
    """Tells torch and XLA how many threads to use; before JAX is imported, which reads it once."""
    torch.set_num_threads(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} "
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        ).strip()


def used(call: Callable[[], object], seconds: float = 0.2) -> float:
    """CPU time of all threads over elapsed time, while calling.

    To be asked while the process is free to use every core: on a single one it can't exceed 1.
    """
    cpu, start = time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
    return (time.process_time() - cpu) / (time.perf_counter() - start)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keeps all threads of this process on as many cores; where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    _move(set(sorted(allowed)[-threads:]))
    try:
        yield
    finally:
        _move(allowed)


def _move(cores: set[int]) -> None:
    # An affinity is a thread's own: the pools that libraries have started must be moved too.
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # one that has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)
