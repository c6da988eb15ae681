"""Every executor, in the order in which reasons are given where none can compute a problem."""

from __future__ import annotations

from fastmeta.executors.base import Executor
from fastmeta.executors.convolutional.cpu import ConvolutionalCpu
from fastmeta.executors.fused.cpu import FusedCpu
from fastmeta.executors.fused.gpu import FusedCuda
from fastmeta.executors.fused.open import FusedOpen
from fastmeta.executors.generic.forms import Loop, Sweep, Vmap
from fastmeta.executors.layers.offers import LayersTorch, LayersTriton

REFERENCE = Loop()
"""The executor that is right by construction: the others are verified against it."""

EXECUTORS: list[Executor] = [
    FusedCpu(), FusedOpen(), FusedCuda(), ConvolutionalCpu(), LayersTriton(), LayersTorch(), Vmap(),
    Sweep(), REFERENCE,
]  # fmt: skip
