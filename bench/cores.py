"""As many cores for every contender, and a measure of how many it uses."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def restrict(threads: int) -> None:
    """Keeps this process, with all that it starts, to so many threads.

    To be called before JAX is imported: it reads its flags and the cores at hand once. The cores
    count: told to use one thread, but given two cores, XLA still keeps a thread for each, and
    spreads a program's operations over them.
    """
    torch.set_num_threads(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} "
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        ).strip()
    if hasattr(os, "sched_setaffinity"):  # Linux
        chosen = set(sorted(os.sched_getaffinity(0))[-threads:])
        # An affinity is a thread's own: those that libraries have started already must move too.
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # one that has ended meanwhile
                os.sched_setaffinity(int(thread.name), chosen)


def used(call: Callable[[], object], seconds: float = 0.2) -> float:
    """CPU time of all threads over elapsed time, while calling; less on a busy machine."""
    cpu, start = time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
    return (time.process_time() - cpu) / (time.perf_counter() - start)
