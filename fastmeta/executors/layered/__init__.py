"""The layered executor: chains of convolutional blocks, a whole meta-step in one call of C++."""

from __future__ import annotations

from fastmeta.executors.layered.chain import Chain, chain
from fastmeta.executors.layered.cpu import Kernel, kernel, run
from fastmeta.executors.layered.serving import declines, grows

__all__ = ["Chain", "Kernel", "chain", "declines", "grows", "kernel", "run"]
