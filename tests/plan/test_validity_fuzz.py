"""A plan is valid for what it was made of alone: whatever changes between calls, each step agrees.

Every kind of change is tried by itself: before it, after it, and after the way back. Then programs
of changes are drawn. `make fuzz` draws 20,000, new ones each time unless it is given a `SEED`, the
first one, which it prints; the tests draw 200, the same ones each time. A failure names its own.
"""

from __future__ import annotations

import os

import pytest
from changing import program
from changing.kinds import KINDS

DRAWN = int(os.environ.get("FASTMETA_FUZZ", "0"))
FIRST = int(os.environ.get("FASTMETA_FUZZ_SEED", "0"))


@pytest.mark.parametrize(
    ("name", "network"),
    [
        pytest.param(name, network, id=f"{name}-{network}")
        for name, kind in KINDS.items()
        for network in program.networks(kind)
    ],
)
def test_a_change_is_seen_and_so_is_its_way_back(name: str, network: str) -> None:
    before, changed, back = program.run(program.alone(KINDS[name], network))
    assert back.equals(before)
    assert changed.equals(before) != KINDS[name].matters


@pytest.mark.parametrize("seed", range(FIRST, FIRST + (DRAWN or 200)))
def test_a_drawn_program_of_changes(seed: int) -> None:
    drawn = program.draw(seed)
    fault = program.failure(drawn)
    if fault:
        pytest.fail(f"{fault}\n{drawn}\nshortened: {program.minimal(drawn)}", pytrace=False)


@pytest.mark.parametrize("network", ["vector", "image", "residual"])
def test_what_is_changed_is_computed_by_kernels(network: str) -> None:
    pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    (seen,) = program.run(program.Program(0, network, ("ReLU", "ReLU"), "cross_entropy", ("step",)))
    assert seen.executor in ("fused-cpu", "layered-cpu")


def test_there_are_kinds_enough() -> None:
    assert len(KINDS) >= 200
