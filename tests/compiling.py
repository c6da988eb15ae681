"""Compiles C++ of csrc/ and tests/csrc/ without Python or torch, with the flags of setup.py."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DRIVERS = ROOT / "tests" / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PYTHON_FACE = ("bindings", "fused", "layered", "open", "programs")
# Asked of the compiler, which may be one for another machine.
_X86 = COMPILER is not None and subprocess.check_output(
    [COMPILER, "-dumpmachine"], text=True
).startswith(("x86_64", "amd64"))
_ALWAYS = ("-std=c++17", "-Wno-psabi", "-pthread", *(("-DFASTMETA_X86",) if _X86 else ()))


@functools.cache
def unit_flags(name: str) -> dict[str, list[str]]:
    """By unit, read from setup.py without running it: `{"lanes_avx2": ["-mavx2", ...], ...}`."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py: no {name}")


def compile_unit(source: Path, folder: Path, *flags: str) -> Path:
    """One object file, named after its source; where `-O3` is asked for, setup.py says of which."""
    result = folder / f"{source.stem}.o"
    own = unit_flags("INSTRUCTION_SETS").get(source.stem, [])
    if _X86 and "-O3" in flags:
        own = unit_flags("SELDOM").get(source.stem, own)
    _compile(*flags, *own, "-c", str(source), "-o", str(result))
    return result


def sources() -> list[Path]:
    """All of csrc/ but its Python face and csrc/cuda."""
    left_out = {*PYTHON_FACE, *(() if _X86 else unit_flags("INSTRUCTION_SETS"))}
    return [
        source
        for source in sorted(CSRC.rglob("*.cpp"))
        if source.stem not in left_out and source.parent.name != "cuda"
    ]


def units_of_the_build() -> list[Path]:
    """The extension's own object files, where its build left them; empty where one is not as new.

    `pip install .` builds in the checkout, an editable install elsewhere.
    """
    newest = max(f.stat().st_mtime for f in (*CSRC.rglob("*.*"), ROOT / "setup.py"))
    for folder in (ROOT / "build").glob("temp.*"):
        units = [folder / source.relative_to(ROOT).with_suffix(".o") for source in sources()]
        if all(unit.exists() and unit.stat().st_mtime > newest for unit in units):
            return units
    return []


def compile_units(folder: Path, *flags: str) -> list[Path]:
    """The object files of `sources`, several at a time."""
    units = sources()  # reads setup.py: CPython 3.11 can't make two syntax trees at a time
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_unit(source, folder, *flags), units))


def link_program(name: str, objects: Iterable[Path], folder: Path, *flags: str) -> Path:
    """The program of tests/csrc/NAME.cpp over these objects."""
    result = folder / name
    source = DRIVERS / f"{name}.cpp"
    _compile(*flags, str(source), *map(str, objects), "-o", str(result))
    return result


def shared_library(source: Path, result: Path, *flags: str) -> Path:
    _compile(
        *_ALWAYS, "-O3", "-fPIC", "-shared", *flags, f"-I{CSRC}", str(source), "-o", str(result)
    )
    return result


def _compile(*arguments: str) -> None:
    assert COMPILER is not None
    command = [COMPILER, *_ALWAYS, f"-I{CSRC}", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
