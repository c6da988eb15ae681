"""How many instructions a step takes: a regression bound that no busy machine disturbs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import compiling
import pytest

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

MEASURED = {"tasks": 11_095_000, "features": 15_899_000}
"""Instructions of a step of W1b in float32 on AVX2, by engine, as GCC 12 compiles it."""
ROOM = 1.03


def collected(*command: str) -> int:
    run = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = re.search(r"Collected : (\d+)", run.stderr)
    assert found is not None, run.stderr
    return int(found[1])


@pytest.fixture(scope="module")
def program(units: list[Path], tmp_path_factory) -> str:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    # What valgrind knows is up to AVX2.
    if "avx2" not in extension.instruction_sets():
        pytest.skip("this processor has no AVX2")
    return str(compiling.link_program("w1b", units, tmp_path_factory.mktemp("w1b"), "-O2"))


def a_step(program: str, engine: str, steps: int, body: int) -> float:
    """Instructions of a meta-step; the difference leaves out what a process costs to start."""
    once, thrice = (
        collected(program, "avx2", engine, count, str(steps), str(body)) for count in ("1", "3")
    )
    return (thrice - once) / 2


@pytest.mark.parametrize("engine", MEASURED)
def test_w1b_takes_no_more_instructions_than_it_did(engine: str, program: str) -> None:
    if not extension.compiler().startswith("GCC 12."):
        pytest.skip(f"the bound is of GCC 12, the compiler is {extension.compiler()}")
    step, before = a_step(program, engine, 5, 0), MEASURED[engine]
    assert step <= before * ROOM, f"{step:,.0f} instructions, {before:,} when last measured"
    assert step >= before / 2, f"{step:,.0f} instructions, less than half of the bound: lower it"


@pytest.mark.parametrize("engine", MEASURED)
def test_inner_steps_do_not_run_the_body(engine: str, program: str) -> None:
    def inner_step(body: int) -> float:
        return (a_step(program, engine, 5, body) - a_step(program, engine, 1, body)) / 4

    # A layer forward takes a multiply-add of eight numbers for each weight, example and task; what
    # is left is the bookkeeping of the layout.
    layer = 40 * 40 * 10 * 25 / 8
    assert abs(inner_step(4) - inner_step(2)) < layer / 20
