"""Whether the CUDA kernels can run on this machine and, where not, why and what to do."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from fastmeta.executors.fused.gpu import FusedCuda
from fastmeta.version import __version__

AGAIN = "run `pip install .` again"


def state(record_file: Path) -> tuple[bool, str, str | None]:
    """Live or not, what it is made of or why it is not, and what to do about that.

    `record_file` is what the build left of how it went.
    """
    try:
        module = importlib.import_module("fastmeta._cuda")
    except ModuleNotFoundError:
        return False, *_missing(record_file)
    except ImportError as error:
        return False, f"built, but it can't be loaded: {error}", f"build it here: {AGAIN}"
    if module.version() != __version__:
        return False, f"built for fastmeta {module.version()}, but this is {__version__}", AGAIN
    built = f"built for sm_{', sm_'.join(module.architectures().split(';'))}"
    if torch.version.cuda is None:
        return False, f"{built}; this torch has no CUDA", "install a torch built with CUDA"
    if not torch.cuda.is_available():
        return (
            False,
            f"{built}; torch finds no CUDA device",
            "`nvidia-smi` says what the driver sees",
        )
    lines: list[str] = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            lines.append(f"{FusedCuda().limits(module, device)[0]:,} bytes a block on {device}")
        except RuntimeError as error:
            lines.append(f"not on {device}: {error}")
    live = any(not line.startswith("not on") for line in lines)
    remedy = (
        None if live else "update the driver, or build with FASTMETA_CUDA_ARCHS for this device"
    )
    return live, "; ".join([built, *lines]), remedy


def _missing(record_file: Path) -> tuple[str, str | None]:
    record: dict[str, Any] = {}
    if record_file.exists():
        record = json.loads(record_file.read_text(encoding="utf-8")).get("cuda", {})
    if not record:
        return "not built", f"with nvcc on PATH, {AGAIN}"
    if record["built"]:
        return "built by another Python than this, or removed since", f"{AGAIN} with this Python"
    return f"not built: {record['reason']}", record["remedy"]
