"""Whether Triton's kernels can run on this machine, and on a device."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

OLDEST = (8, 0)
"""The compute capability that the tests compile for first."""

OLDEST_TRITON = (3, 6)
"""The release that the tests compile with."""


def missing() -> tuple[str, str | None] | None:
    """Why no device here can run the kernels, and what to do; None where nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "`pip install triton`; there is one for Linux only"
    if importlib.util.find_spec("fastmeta.kernels") is None:
        return "fastmeta.kernels is not installed", "run `pip install .` again"
    triton: Any = importlib.import_module("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than 3.6", "install a newer torch and Triton"
    interpreted = importlib.import_module("fastmeta.kernels.convolutions").INTERPRETED
    if torch.version.hip is not None:
        return "the kernels were never tried on ROCm", None
    if torch.version.cuda is None:
        return "this torch has no CUDA", "install a torch built with CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device", "`nvidia-smi` says what the driver sees"
    if interpreted:
        return "TRITON_INTERPRET=1 leaves the kernels to the host", "unset it"
    return None


def too_old(device: torch.device) -> str | None:
    """Why that device can't run them; None where it can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def state(made_of: str) -> tuple[bool, str, str | None]:
    """Live or not, what it is made of or why it is not, and what to do about that."""
    nothing_works = missing()
    if nothing_works is not None:
        return False, *nothing_works
    made_of = f"{made_of}; Triton {importlib.import_module('triton').__version__}"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    why = [too_old(device) for device in devices]
    if all(why):
        return False, "; ".join(sorted({str(reason) for reason in why})), None
    return True, made_of, None
