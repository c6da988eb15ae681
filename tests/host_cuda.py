"""The CUDA kernels compiled for the host, where FASTMETA_CUDA_ON_HOST=1 sends the fused step."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiling

TWIN = compiling.ROOT / "tests" / "cuda_on_host"
SOURCES = [
    *sorted((compiling.CSRC / "cuda").glob("*.c*")), compiling.CSRC / "network.cpp",
    TWIN / "fibres.cpp",
]  # fmt: skip
# -O1: compiled in half the time, and fast enough for the sizes of tests.
FLAGS = (
    "-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
    "-Wno-clobbered", "-DFASTMETA_CUDA_ON_HOST", '-DFASTMETA_VERSION="0"',
    '-DFASTMETA_CUDA_ARCHS="host"', f"-I{TWIN}",
)  # fmt: skip


def build() -> Path:
    """The module's file; compiled anew where a source has changed."""
    import pybind11

    python = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    digest = hashlib.sha256(repr((FLAGS, sys.version, compiling.COMPILER)).encode())
    for file in sorted([*compiling.CSRC.rglob("*"), *TWIN.glob("*")]):
        if file.is_file() and "cpu" not in file.parts:
            digest.update(file.read_bytes())
    folder = compiling.ROOT / "build" / "cuda_on_host"
    result = folder / f"_cuda-{digest.hexdigest()[:16]}.so"
    if result.exists():
        return result
    work = folder / f"work-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        unit = work / f"{source.name}.o"
        run(*FLAGS, *python, "-x", "c++", "-c", str(source), "-o", str(unit))
        return str(unit)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        units = list(pool.map(compile_one, SOURCES))
    whole = work / result.name
    run("-shared", "-pthread", *units, "-o", str(whole))
    whole.replace(result)  # at once: another process may want it too
    return result


def register() -> None:
    """Makes it the module that the package looks for."""
    name = "fastmeta._cuda_on_host"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("_cuda", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def run(*arguments: str) -> None:
    assert compiling.COMPILER is not None
    command = [compiling.COMPILER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
