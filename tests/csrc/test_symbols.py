"""No instruction set's code reaches a machine without it: symbols that units share, instructions.

The linker keeps one of several weak definitions of a name. Where an inline function is emitted by
two units, the one compiled for AVX-512 may be the one that the baseline calls.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

SETS = ("baseline", "avx2", "avx512")
UNITS = [f"{kernels}_{name}" for kernels in ("lanes", "conv") for name in SETS]
_VEX = re.compile(r"^v[a-z]")
# Registers that only AVX-512's encoding reaches.
_EVEX = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def by_set(units: list[Path]) -> dict[str, Path]:
    found = {unit.stem: unit for unit in units}
    return {name: found[name] for name in UNITS if name in found}


def in_namespace(symbol: str, name: str) -> bool:
    """Also of a symbol that is too deep for the demangler, which leaves it as it was."""
    return f"fastmeta::{name}::" in symbol or f"8fastmeta{len(name)}{name}" in symbol


def weak_symbols(unit: Path) -> set[str]:
    lines = output("nm", "--demangle", "--defined-only", str(unit)).splitlines()
    fields = [line.split(maxsplit=2) for line in lines]
    # What begins so holds an address, the same in every unit.
    return {n for _, kind, n in fields if kind in "WVuvw" and not n.startswith("DW.ref.")}


@pytest.mark.parametrize("name", UNITS)
def test_what_a_unit_shares_with_others_bears_its_name(name: str, by_set) -> None:
    if name not in by_set:
        pytest.skip(f"{name} is not built on this machine")
    symbols = weak_symbols(by_set[name])
    assert symbols, "no weak symbols: the test does not see any more what it was written for"
    assert [s for s in symbols if not in_namespace(s, name.split("_")[1])] == []


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_nothing_when_it_is_loaded(name: str, by_set) -> None:
    """Which would be before anybody asked what the processor can do."""
    if name not in by_set:
        pytest.skip(f"{name} is not built on this machine")
    sections = output("objdump", "--section-headers", str(by_set[name]))
    assert not re.search(r"\.(init_array|ctors)", sections)


@pytest.fixture(scope="module")
def functions() -> dict[str, list[str]]:
    """The installed extension's instructions, by function."""
    if "avx2" not in output("nm", "--demangle", extension.__file__):
        pytest.skip("the extension is stripped, or of another machine than x86-64")
    text = output("objdump", "-d", "-C", "--no-show-raw-insn", extension.__file__)
    found: dict[str, list[str]] = {}
    for block in re.split(r"\n\n", text):
        head = re.match(r"[0-9a-f]+ <(.*)>:\n", block)
        if head is not None:
            lines = block.splitlines()[1:]
            found.setdefault(head[1], []).extend(line.split("\t")[-1].strip() for line in lines)
    return found


def belongs_to(function: str, name: str) -> bool:
    return in_namespace(function, name) or f"fastmeta::cpu::{name}()" in function


def test_wide_instructions_stand_in_functions_of_their_set_alone(functions) -> None:
    wrong: dict[str, str] = {}
    seen = {"avx2": 0, "avx512": 0}
    for function, instructions in functions.items():
        if belongs_to(function, "avx512"):
            seen["avx512"] += sum("%zmm" in i for i in instructions)
            continue
        if belongs_to(function, "avx2"):
            seen["avx2"] += sum("%ymm" in i for i in instructions)
            forbidden = [i for i in instructions if _EVEX.search(i)]
        else:
            forbidden = [i for i in instructions if _VEX.match(i) or _EVEX.search(i)]
        if forbidden:
            wrong[function] = forbidden[0]
    assert wrong == {}
    assert min(seen.values()) > 1000, "the wide functions were not found"
