"""The CUDA kernels compiled for the host, which FASTMETA_CUDA_ON_HOST=1 has the tests run."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import compiling
import torch

from fastmeta.executors.base import Executor
from fastmeta.executors.every import EXECUTORS
from fastmeta.executors.fused.cpu import FusedCpu
from fastmeta.executors.fused.gpu import FusedCuda

ON_HOST = os.environ.get("FASTMETA_CUDA_ON_HOST", "") == "1"

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


@functools.cache
def module() -> ModuleType:
    """The compiled module."""
    spec = importlib.util.spec_from_file_location("_cuda", build())
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class FusedCudaOnHost(FusedCuda):
    """The CUDA kernels, executed on the host for tensors that lie there."""

    name = "fused-cuda-on-host"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def module(self) -> ModuleType | None:
        return module()

    def limits(self, module: ModuleType, device: torch.device) -> tuple[int, int]:
        return module.limits(0)  # as the environment says now


def played(executors: list[Executor]) -> list[Executor]:
    """The executors with these kernels for the fused step, in the place of the processor's own."""
    return [
        FusedCudaOnHost() if isinstance(executor, FusedCuda) else executor
        for executor in executors
        if not isinstance(executor, FusedCpu)
    ]


def register() -> None:
    """Has them play for the whole process."""
    EXECUTORS[:] = played(EXECUTORS)


def run(*arguments: str) -> None:
    assert compiling.COMPILER is not None
    command = [compiling.COMPILER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
