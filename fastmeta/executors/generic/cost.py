"""Estimates of the general path's time and memory: a cost model with measured constants.

The constants were fitted to `python -m bench.crossover` (docs/design.md, "Choosing a form").
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmeta.executors.problem import Problem
from fastmeta.network.profile import Profile

CHUNK_BYTES = 1 << 26
"""What one chunk of tasks under `vmap` may keep alive, by estimate."""


@dataclass(frozen=True)
class _Rates:
    """Seconds for each unit of work."""

    operator: float
    """Overhead: of each operator of each task in the loop, of each chunk under `vmap`."""
    flop: float
    byte: float
    """Of each byte that an operator writes."""
    weight_byte: float
    """Of each byte of a task's own weights."""


_LOOP = _Rates(operator=2.3e-6, flop=2.9e-12, byte=3.6e-10, weight_byte=0.90e-10)
_VMAP = _Rates(operator=9.6e-6, flop=5.5e-12, byte=3.9e-10, weight_byte=1.17e-10)


def loop(profile: Profile, problem: Problem) -> float:
    """The estimated seconds of a step, task by task."""
    return _seconds(profile, problem, _LOOP, problem.tasks.rounded)


def vmap(profile: Profile, problem: Problem) -> float:
    """The estimated seconds of a step under `vmap`, in chunks of `chunk_size`."""
    chunks = -(-problem.tasks.rounded // chunk_size(profile, problem))
    return _seconds(profile, problem, _VMAP, chunks)


def cheapest(profile: Profile, problem: Problem) -> float:
    """The estimated seconds of the faster of the two."""
    return min(loop(profile, problem), vmap(profile, problem))


def chunk_size(profile: Profile, problem: Problem) -> int:
    """The number of tasks that `vmap` takes at a time: even chunks within `CHUNK_BYTES`."""
    tasks = problem.tasks.rounded
    most = max(1, CHUNK_BYTES // max(1, task_bytes(profile, problem)))
    chunks = -(-tasks // most)
    return -(-tasks // chunks)


def task_bytes(profile: Profile, problem: Problem) -> int:
    """The estimated bytes that one task keeps alive until its backward."""
    kept = 4 if problem.second_order else 2  # forward, backward, and the tape of both
    steps, support, query = _sizes(problem)
    activations = profile.bytes_written * (kept * steps * support + 2 * query)
    return activations + profile.parameter_bytes * (2 * steps + 2)


def meta_step_flops(profile: Profile, problem: Problem, body: int = 0) -> int:
    """Arithmetic of a step: `T (K (3 + 6) F(N) + 3 F(Q))`, F being a forward pass.

    Of an example's FLOPs forward, those of a `body` are run once: `T (3 F(N) + 3 F(Q))`.
    """
    steps, support, query = _sizes(problem)
    inner, once = (9, 3) if problem.second_order else (3, 1)
    head = inner * steps * support + 3 * query
    frozen = once * min(steps, 1) * support + 3 * query
    return problem.tasks.tasks * ((profile.flops - body) * head + body * frozen)


def _seconds(profile: Profile, problem: Problem, rates: _Rates, repeats: int) -> float:
    steps, support, query = _sizes(problem)
    tasks = problem.tasks.rounded
    inner = 9 if problem.second_order else 3
    passes = steps * inner + 3
    examples = tasks * (steps * inner * support + 3 * query)
    return (
        repeats * passes * profile.operators * rates.operator
        + examples * profile.flops * rates.flop
        + examples * profile.bytes_written * rates.byte
        + tasks * passes * profile.parameter_bytes * rates.weight_byte
    )


def _sizes(problem: Problem) -> tuple[int, int, int]:
    """K inner steps, N support and Q query examples."""
    tasks = problem.tasks
    return problem.inner.steps, tasks.support.count, tasks.query.count if tasks.query else 0
