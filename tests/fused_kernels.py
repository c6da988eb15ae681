"""The fused kernels of this build and processor: instruction sets, and what their lanes are."""

from __future__ import annotations

from fastmeta import _C

KERNELS = {
    f"{isa}-{engine}": {"FASTMETA_ISA": isa, "FASTMETA_ENGINE": engine}
    for isa in _C.instruction_sets()
    for engine in ("tasks", "features")
    if isa != "plain"
} | {"plain": {"FASTMETA_ISA": "plain", "FASTMETA_ENGINE": ""}}
"""By a readable name, the environment in which that kernel is taken."""
