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
    """True where the layers' rules may be faster than autograd on such a network."""
    factors: tuple[tuple[str, float], ...] = ()
    """By form that was timed, its seconds over those estimated."""


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
    rules = "layered" not in unavailable and sizes.rules and not sizes.low_memory
    if rules and not sizes.factors:
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
    times = _times(profile, sizes, unavailable, chunk, rules)
    if len(times) > 1:
        return _by_time(profile, sizes, chunk, times)
    if "vmap" in unavailable:
        return Choice("loop", 1, f"vmap can't serve: {unavailable['vmap']}")
    if sizes.tasks == 1:
        return Choice("loop", 1, "there is one task, so nothing to map over")
    loop, vmap = seconds(profile, sizes, chunk)
    said = f"estimated {1e3 * loop:.1f} ms in the loop, {1e3 * vmap:.1f} ms under vmap"
    form = _estimated(profile, sizes, chunk)
    return Choice(form, chunk if form == "vmap" else 1, said)


def _estimated(profile: Profile, sizes: Sizes, chunk: int) -> str:
    """Loop or `vmap`; where they are close the loop, which needs less memory."""
    loop, vmap = seconds(profile, sizes, chunk)
    return "vmap" if vmap < 0.9 * loop else "loop"


def _times(
    profile: Profile, sizes: Sizes, unavailable: dict[str, str], chunk: int, rules: bool
) -> dict[str, float]:
    """Seconds of the forms that were timed and can serve."""
    mapped = "vmap" not in unavailable and sizes.tasks > 1
    serving = {"loop": True, "vmap": mapped, "layered": rules}
    return {
        form: factor * estimate(form, profile, sizes, chunk)
        for form, factor in sizes.factors
        if serving[form]
    }


def _by_time(profile: Profile, sizes: Sizes, chunk: int, times: dict[str, float]) -> Choice:
    """The fastest of the forms that were timed."""
    estimated = _estimated(profile, sizes, chunk) if "vmap" in times else "loop"
    # A run beside other processes is a surer sign of much than of little.
    handicap = {"loop": _MUCH, "vmap": _MUCH, "layered": _LITTLE, estimated: 1.0}
    form = min(times, key=lambda form: times[form] * handicap[form])
    said = ", ".join(f"{1e3 * seconds:.1f} ms {_WHERE[form]}" for form, seconds in times.items())
    chunks = {"loop": 1, "vmap": chunk, "layered": sizes.tasks}
    return Choice(form, chunks[form], f"timed on some tasks: {said}")


_MUCH, _LITTLE = 1.2, 1.05
_WHERE = {"loop": "in the loop", "vmap": "under vmap", "layered": "layer by layer"}


def close(profile: Profile, sizes: Sizes) -> bool:
    """Return whether loop and `vmap` are closer than the estimates are sure of."""
    loop, vmap = seconds(profile, sizes, chunk_size(profile, sizes))
    return 1 / _UNSURE < loop / vmap < _UNSURE


_UNSURE = 5.0
"""The factor by which estimates were found to be off."""


def estimate(form: str, profile: Profile, sizes: Sizes, chunk: int) -> float:
    """Seconds of a form; of the layers' rules, those of the loop."""
    loop, vmap = seconds(profile, sizes, chunk)
    return vmap if form == "vmap" else loop


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
