"""Finds nvcc and compiles csrc/cuda for setup.py."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools.errors import BaseError

CUDA_ARCHITECTURES = "80;90;100"
OLDEST = 80
"""The first architecture with TF32 on its tensor cores."""

AGAIN = "run `pip install .` again"


class ExtensionError(BaseError):
    """Why the extension was not built, and what a person can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def find_nvcc() -> str:
    """Where it is asked for, or on the path."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        where = f"CUDA_HOME ({home}) has no bin/nvcc" if home else "nvcc was not found"
        raise ExtensionError(where, f"install the CUDA toolkit, or set CUDA_HOME, and {AGAIN}")
    return nvcc


def known_architectures(nvcc: str) -> list[str]:
    """Those asked for that this nvcc can compile for."""
    asked = os.environ.get("FASTMETA_CUDA_ARCHS", "") or CUDA_ARCHITECTURES
    known = {int(line.removeprefix("compute_")) for line in tell(nvcc, "--list-gpu-arch").split()}
    usable = [str(a) for a in sorted(known) if a >= OLDEST]
    found = [a for a in usable if a in asked.replace(",", ";").split(";")]
    if not found:
        raise ExtensionError(
            f"{nvcc} can compile the kernels for none of the architectures {asked}",
            f"set FASTMETA_CUDA_ARCHS to some of {', '.join(usable)} and {AGAIN}",
        )
    return found


def tell(*command: str) -> str:
    """What a compiler says; **raises** the first line of why it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [x for x in (done.stderr + done.stdout).splitlines() if "error" in x] or ["no word"]
        raise ExtensionError(
            f"{command[0]} failed: {lines[0].strip()[:200]}",
            "a host compiler too new for it can be replaced by setting NVCC_PREPEND_FLAGS='-ccbin "
            f"g++-12'; then {AGAIN}",
        )
    return done.stdout + done.stderr


def compile_kernels(
    nvcc: str, architectures: list[str], folder: Path
) -> tuple[Path, dict[str, dict[str, int]]]:
    """One object file with code for each architecture, and PTX for those that are not named.

    All from the PTX of the oldest, which has all that the kernels need: the front end so runs once.
    And by architecture what the kernels take at most: registers a thread, bytes spilled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unit = folder / "step.cu.o"
    oldest = architectures[0]
    code = ",".join([*(f"sm_{a}" for a in architectures), f"compute_{oldest}"])
    report = tell(
        nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "0",
        "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-gencode=arch=compute_{oldest},code=[{code}]",
        "-c", "csrc/cuda/step.cu", "-o", str(unit),
    )  # fmt: skip
    return unit, {f"sm_{a}": _resources(report, f"sm_{a}") for a in architectures}


def _resources(report: str, architecture: str) -> dict[str, int]:
    entries = re.split(r"Compiling entry function", report)[1:]
    here = "".join(entry for entry in entries if f"for '{architecture}'" in entry)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", here)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", here)]
    return {"registers": max(registers, default=-1), "spilled": max(spilled, default=-1)}


def link(nvcc: str, units: list[str], result: Path) -> None:
    """With the static CUDA runtime, so that nothing of CUDA but the driver is needed to run."""
    tell(nvcc, "-shared", "--cudart", "static", *units, "-o", str(result))
