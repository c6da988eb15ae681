"""Which form of the general path is fastest: a cost model with measured constants.

The constants were fitted to `python -m bench.crossover` (docs/design.md, "Choosing a form").
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmeta.plan.profile import Profile

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


FUSED_CALL = 1e-4
"""What the fused kernels' Python side takes."""


@dataclass(frozen=True)
class Sizes:
    """Tasks, support and query examples, inner steps; and what is asked for."""

    tasks: int
    support: int
    query: int
    steps: int
    second_order: bool
    low_memory: bool
    group: tuple[int, int, float] = (0, 0, 0.0)
    """Of the fused kernels: how many tasks at a time, their storage in bytes, their seconds."""
    compiled: bool = False
    """Whether the layered executor's compiled step can serve."""
    rules: bool = False
    """Whether the layers' rules were measured to be no slower than autograd on such a network."""


@dataclass(frozen=True)
class Choice:
    """The form that computes the step, how many tasks at a time, and why."""

    form: str
    chunk: int
    reason: str


def choose(profile: Profile, sizes: Sizes, unavailable: dict[str, str]) -> Choice:
    """The fastest form that can serve; for low memory the one that is flat in K."""
    chunk = chunk_size(profile, sizes)
    if "layered" not in unavailable and sizes.compiled:
        return Choice("layered", sizes.tasks, "convolutions, all tasks in one call")
    if "layered" not in unavailable and sizes.rules and not sizes.low_memory:
        return Choice("layered", sizes.tasks, "convolutions, layer by layer")
    if "fused" not in unavailable:
        fused = FUSED_CALL + sizes.group[2]
        loop, vmap = seconds(profile, sizes, chunk)
        if fused < min(loop, vmap):
            return Choice(
                "fused",
                sizes.group[0],
                f"estimated {1e3 * fused:.2f} ms fused, {1e3 * min(loop, vmap):.1f} ms otherwise",
            )
    if sizes.low_memory:
        return _flat(unavailable)
    if "vmap" in unavailable:
        return Choice("loop", 1, f"vmap can't serve: {unavailable['vmap']}")
    if sizes.tasks == 1:
        return Choice("loop", 1, "there is one task, so nothing to map over")
    loop, vmap = seconds(profile, sizes, chunk)
    estimate = f"estimated {1e3 * loop:.1f} ms in the loop, {1e3 * vmap:.1f} ms under vmap"
    # Where they are close, the loop: it needs less memory, and its estimate is the surer one.
    if vmap < 0.9 * loop:
        return Choice("vmap", chunk, estimate)
    return Choice("loop", 1, estimate)


def chunk_size(profile: Profile, sizes: Sizes) -> int:
    """How many tasks `vmap` takes at a time: even chunks that stay within `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES // max(1, task_bytes(profile, sizes)))
    chunks = -(-sizes.tasks // most)
    return -(-sizes.tasks // chunks)


def task_bytes(profile: Profile, sizes: Sizes) -> int:
    """What one task keeps alive until its backward, by estimate."""
    kept = 4 if sizes.second_order else 2  # forward, backward, and the tape of both
    activations = profile.bytes_written * (kept * sizes.steps * sizes.support + 2 * sizes.query)
    return activations + profile.parameter_bytes * (2 * sizes.steps + 2)


def meta_step_flops(profile: Profile, sizes: Sizes, body: int = 0) -> int:
    """Arithmetic of a step: `T (K (3 + 6) F(N) + 3 F(Q))`, F being a forward pass.

    Of an example's FLOPs forward, those of a `body` are run once: `T (3 F(N) + 3 F(Q))`.
    """
    inner, once = (9, 3) if sizes.second_order else (3, 1)
    head = inner * sizes.steps * sizes.support + 3 * sizes.query
    frozen = once * min(sizes.steps, 1) * sizes.support + 3 * sizes.query
    return sizes.tasks * ((profile.flops - body) * head + body * frozen)


def _flat(unavailable: dict[str, str]) -> Choice:
    if "sweep" not in unavailable:
        return Choice("sweep", 1, 'memory="low" asks for memory flat in K')
    return Choice("loop", 1, f"the sweep can't serve: {unavailable['sweep']}")


def seconds(profile: Profile, sizes: Sizes, chunk: int) -> tuple[float, float]:
    """Estimated time of the loop and of `vmap`."""
    inner = 9 if sizes.second_order else 3
    passes = sizes.steps * inner + 3
    examples = sizes.tasks * (sizes.steps * inner * sizes.support + 3 * sizes.query)
    chunks = -(-sizes.tasks // chunk)

    def total(rates: _Rates, repeats: int) -> float:
        return (
            repeats * passes * profile.operators * rates.operator
            + examples * profile.flops * rates.flop
            + examples * profile.bytes_written * rates.byte
            + sizes.tasks * passes * profile.parameter_bytes * rates.weight_byte
        )

    return total(_LOOP, sizes.tasks), total(_VMAP, chunks)
