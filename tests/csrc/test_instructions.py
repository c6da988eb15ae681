"""How many instructions a step takes: a regression bound that no busy machine disturbs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import compiling
import pytest

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

MEASURED = {"tasks": 11_681_000, "features": 16_156_000}
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


@pytest.mark.parametrize("engine", MEASURED)
def test_w1b_takes_no_more_instructions_than_it_did(
    engine: str, units: list[Path], tmp_path: Path
) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    # What valgrind knows is up to AVX2.
    if "avx2" not in extension.instruction_sets():
        pytest.skip("this processor has no AVX2")
    if not extension.compiler().startswith("GCC 12."):
        pytest.skip(f"the bound is of GCC 12, the compiler is {extension.compiler()}")
    program = str(compiling.link_program("w1b", units, tmp_path, "-O2"))
    # The difference leaves out what a process costs to start.
    once, thrice = (collected(program, "avx2", engine, count) for count in ("1", "3"))
    step, before = (thrice - once) / 2, MEASURED[engine]
    assert step <= before * ROOM, f"{step:,.0f} instructions, {before:,} when last measured"
    assert step >= before / 2, f"{step:,.0f} instructions, less than half of the bound: lower it"
