"""Which form of the general path is fastest: a cost model with measured constants.

The constants were fitted to `python -m bench.crossover` (docs/design.md, "Choosing a form").
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmeta.plan.profile import Profile

CHUNK_BYTES = 1 << 28
"""What one chunk of tasks under `vmap` may keep alive, by estimate."""

_LOOP_OPERATOR = 7e-6
"""Seconds of overhead per operator of a task in the loop."""
_VMAP_OPERATOR = 32e-6
"""The same under `vmap`, per chunk."""
_FLOP = 1 / 60e9
_BYTE = 1 / 4e9
"""Seconds per byte of per-task weights that a batched product reads or writes."""
_CONVOLUTION_PENALTY = 2.0
"""A batched convolution with per-task weights is a grouped one, which libraries run badly."""


@dataclass(frozen=True)
class Sizes:
    """Tasks, support and query examples, inner steps; and what is asked for."""

    tasks: int
    support: int
    query: int
    steps: int
    second_order: bool
    low_memory: bool


@dataclass(frozen=True)
class Choice:
    """The form that computes the step, how many tasks at a time, and why."""

    form: str
    chunk: int
    reason: str


def choose(profile: Profile, sizes: Sizes, unavailable: dict[str, str]) -> Choice:
    """The fastest form that can serve; for low memory the one that is flat in K."""
    if sizes.low_memory:
        return _flat(unavailable)
    chunk = min(sizes.tasks, chunk_size(profile, sizes))
    if "vmap" in unavailable:
        return Choice("loop", 1, f"vmap can't serve: {unavailable['vmap']}")
    if sizes.tasks == 1:
        return Choice("loop", 1, "there is one task, so nothing to map over")
    loop, vmap = seconds(profile, sizes, chunk)
    estimate = f"estimated {1e3 * loop:.1f} ms in the loop, {1e3 * vmap:.1f} ms under vmap"
    if vmap < loop:
        return Choice("vmap", chunk, estimate)
    return Choice("loop", 1, estimate)


def chunk_size(profile: Profile, sizes: Sizes) -> int:
    """How many tasks `vmap` takes at a time so that memory stays within `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // max(1, task_bytes(profile, sizes)))


def task_bytes(profile: Profile, sizes: Sizes) -> int:
    """What one task keeps alive until its backward, by estimate."""
    kept = 4 if sizes.second_order else 2  # forward, backward, and the tape of both
    activations = profile.bytes_written * (kept * sizes.steps * sizes.support + 2 * sizes.query)
    return activations + profile.parameter_bytes * (2 * sizes.steps + 2)


def meta_step_flops(profile: Profile, sizes: Sizes) -> int:
    """Arithmetic of a step: `T (K (3 + 6) F(N) + 3 F(Q))`, F being a forward pass."""
    inner = 9 if sizes.second_order else 3
    examples = inner * sizes.steps * sizes.support + 3 * sizes.query
    return sizes.tasks * profile.flops * examples


def _flat(unavailable: dict[str, str]) -> Choice:
    if "sweep" not in unavailable:
        return Choice("sweep", 1, 'memory="low" asks for memory flat in K')
    return Choice("loop", 1, f"the sweep can't serve: {unavailable['sweep']}")


def seconds(profile: Profile, sizes: Sizes, chunk: int) -> tuple[float, float]:
    """Estimated time of the loop and of `vmap`."""
    passes = sizes.steps * (9 if sizes.second_order else 3) + 3
    operators = passes * profile.operators
    arithmetic = meta_step_flops(profile, sizes) * _FLOP
    loop = sizes.tasks * operators * _LOOP_OPERATOR + arithmetic
    chunks = -(-sizes.tasks // chunk)
    weights = sizes.tasks * passes * profile.parameter_bytes * _BYTE
    if profile.has_convolution:
        arithmetic *= _CONVOLUTION_PENALTY
    return loop, chunks * operators * _VMAP_OPERATOR + arithmetic + weights
