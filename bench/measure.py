"""How things are measured here: interleaved medians for time, a fresh process for memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

STATUS = Path("/proc/self/status")


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each, one call of each in turn, so that a slow spell hits all."""
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while len(next(iter(samples.values()))) < least or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            begin = clock()
            function()
            samples[name].append(1e3 * (clock() - begin))
    return {name: median(values) for name, values in samples.items()}


def peak_above_start(function: Callable[[], object], calls: int = 3) -> float:
    """Peak resident memory in MB while calling, above what the process held before (Linux)."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(calls):
        function()
    return _resident("VmHWM") - before


def in_fresh_process(module: str, *arguments: str) -> dict[str, float]:
    """Runs `python -m module arguments` and reads the JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _resident(field: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{STATUS} has no {field}")
