"""Compiles C++ of csrc/ and tests/csrc/ without Python or torch, with the flags of setup.py."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DRIVERS = ROOT / "tests" / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PYTHON_FACE = ("bindings", "fused")
_ALWAYS = ("-std=c++17", "-Wno-psabi", "-pthread", "-DFASTMETA_X86")


def instruction_flags() -> dict[str, list[str]]:
    """By unit, read from setup.py without running it: `{"lanes_avx2": ["-mavx2", ...], ...}`."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTRUCTION_SETS":
            return ast.literal_eval(node.value)
    raise LookupError("setup.py: no INSTRUCTION_SETS")


def compile_unit(source: Path, folder: Path, *flags: str) -> Path:
    """One object file, named after its source."""
    result = folder / f"{source.stem}.o"
    units = instruction_flags().get(source.stem, [])
    _compile(*_ALWAYS, *flags, *units, f"-I{CSRC}", "-c", str(source), "-o", str(result))
    return result


def compile_units(folder: Path, *flags: str) -> list[Path]:
    """All of csrc/ but its Python face, several at a time."""
    sources = [s for s in sorted(CSRC.rglob("*.cpp")) if s.stem not in PYTHON_FACE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_unit(source, folder, *flags), sources))


def link_program(name: str, objects: Iterable[Path], folder: Path, *flags: str) -> Path:
    """The program of tests/csrc/NAME.cpp over these objects."""
    result = folder / name
    source = str(DRIVERS / f"{name}.cpp")
    _compile(
        *_ALWAYS, *flags, f"-I{CSRC}", source, *map(str, objects), "-o", str(result)
    )  # fmt: skip
    return result


def shared_library(source: Path, result: Path, *flags: str) -> Path:
    _compile(
        *_ALWAYS, "-O3", "-fPIC", "-shared", *flags, f"-I{CSRC}", str(source), "-o", str(result)
    )
    return result


def build_as_installed(folder: Path) -> list[Path]:
    """The objects that setup.py makes of csrc/: what an installation is linked of."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    _run([*command, "--build-temp", str(folder), "--build-lib", str(folder / "lib")])
    return sorted(folder.rglob("*.o"))


def _compile(*arguments: str) -> None:
    assert COMPILER is not None
    _run([COMPILER, *arguments])


def _run(command: list[str]) -> None:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
