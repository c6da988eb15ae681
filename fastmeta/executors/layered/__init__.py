"""The layered executor: the meta-step layer by layer, all tasks at once.

Chains of convolutional blocks on the CPU go as one call of C++ (`cpu.py`); whatever else is made of
known layers goes by each layer's own four rules in torch's operators (`program.py`).
"""

from fastmeta.executors.layered.cpu import Kernel
from fastmeta.executors.layered.program import Program
from fastmeta.executors.layered.recipe import Recipe, recipe
from fastmeta.executors.layered.serving import declines, not_compiled
from fastmeta.executors.layered.ways import Way, run, way

__all__ = [
    "Kernel", "Program", "Recipe", "Way", "declines", "not_compiled", "recipe", "run", "way",
]  # fmt: skip
