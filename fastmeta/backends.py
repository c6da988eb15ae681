"""What is live on this machine and, for what is not, why and what to do."""

import importlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from fastmeta import cuda_backend
from fastmeta.executors import triton_device
from fastmeta.version import __version__

# Written by setup.py when the package was built.
BUILD_RECORD = Path(__file__).with_name("_build.json")


@dataclass(frozen=True)
class Backend:
    """One way to run a meta-learning step.

    **Arguments:**

    - `name`: the backend, as `executor` reports it.
    - `live`: whether it can run here and now.
    - `detail`: what it is made of, or why it is not live.
    - `remedy`: what to do so that it becomes live; `None` where nothing can or need be done.
    """

    name: str
    live: bool
    detail: str
    remedy: str | None = None


def backends() -> dict[str, Backend]:
    """Every backend by name, live or not.

    **Returns:** a dictionary from name to [`Backend`][]; its order is that of `describe`.
    """
    found = [
        Backend("generic", True, f"any module, any loss; torch {torch.__version__}"),
        _extension(),
        _kernels("fused-cpu", "FusedStep", "chains of linear layers"),
        _kernels("layered-cpu", "ConvStep", "networks of convolutional blocks"),
        Backend("layered-torch", True, "networks of known layers, by torch's operators"),
        Backend("fused-cuda", *cuda_backend.state(BUILD_RECORD)),
        Backend("layered-triton", *triton_device.state("networks with convolutions")),
    ]
    return {backend.name: backend for backend in found}


def describe() -> str:
    """This machine and its backends as a table to read, or to paste into a bug report."""
    facts = {
        "fastmeta": f"{__version__}  ({Path(__file__).parent})",
        "Python": f"{platform.python_version()}  ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "CPU features": _cpu_features(),
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} in the machine",
        "CUDA devices": _cuda_devices(),
    }
    found = backends().values()
    width = max(len(name) for name in [*facts, *(backend.name for backend in found)])
    lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
    lines.append("")
    for backend in found:
        lines.append(
            f"{backend.name:{width}}  {'live' if backend.live else '-':4}  {backend.detail}"
        )
        if backend.remedy is not None:
            lines.append(f"{'':{width}}        to do: {backend.remedy}")
    return "\n".join(lines)


def _load_extension() -> ModuleType:
    return importlib.import_module("fastmeta._C")


def _extension() -> Backend:
    try:
        extension = _load_extension()
    except ModuleNotFoundError as error:
        if error.name != "fastmeta._C":
            raise
        return _missing_extension()
    except ImportError as error:
        return Backend(
            "extension",
            False,
            f"built, but it can't be loaded: {error}",
            "build it on this machine: `pip install --force-reinstall --no-deps .`",
        )
    if extension.version() != __version__:
        return Backend(
            "extension",
            False,
            f"built for fastmeta {extension.version()}, but this is {__version__}",
            "run `pip install .` again",
        )
    return Backend("extension", True, f"{extension.version()}, built by {extension.compiler()}")


def _kernels(name: str, step: str, serves: str) -> Backend:
    if not _extension().live:
        return Backend(name, False, "needs the compiled extension")
    if not hasattr(_load_extension(), step):
        return Backend(
            name,
            False,
            "the compiled extension is of an earlier checkout",
            "run `pip install .` again",
        )
    sets: list[str] = _load_extension().instruction_sets()
    forced = os.environ.get("FASTMETA_ISA", "")
    if forced and forced not in sets:
        return Backend(
            name,
            False,
            f"FASTMETA_ISA is {forced!r}, but this machine runs {', '.join(sets)}",
            "unset FASTMETA_ISA or set it to one of those",
        )
    return Backend(name, True, f"{serves}; {forced or sets[0]}")


def _missing_extension() -> Backend:
    if not BUILD_RECORD.exists():
        return Backend(
            "extension",
            False,
            f"{BUILD_RECORD.parent} is a source tree that was not built",
            "start Python in another folder to import the installed package, "
            "or `pip install -e .` here",
        )
    record: dict[str, Any] = json.loads(BUILD_RECORD.read_text(encoding="utf-8"))
    if record["built"]:
        return Backend(
            "extension",
            False,
            f"built by another Python than this ({platform.python_version()}), or removed since",
            "run `pip install .` again with this Python",
        )
    return Backend("extension", False, f"not built: {record['reason']}", record["remedy"])


def _cpu_features() -> str:
    try:
        features: dict[str, bool] = _load_extension().cpu_features()
    except ImportError:
        return f"{torch.backends.cpu.get_cpu_capability()} (as torch sees it)"
    return " ".join(name for name, live in features.items() if live) or "none of those asked for"


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    devices = range(torch.cuda.device_count())
    return ", ".join(torch.cuda.get_device_name(device) for device in devices)
