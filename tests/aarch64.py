"""The compiled steps on AArch64, without Python: `make aarch64`.

They run in an emulator, whose speed says nothing. What is looked at is that the numbers are right,
and that the machine code multiplies whole vectors and keeps a tile's sums in registers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import compiling

EMULATOR = shutil.which("qemu-aarch64")
FLAGS = ("-O3", "-fno-math-errno")  # setup.py's
# Not pool_is_shared, which counts threads: the emulator has some of its own.
PROGRAMS = {"engines_agree": "120", "conv_agrees": "48"}
UNITS = ("lanes_baseline", "conv_baseline")
FEWEST, LARGEST = 12, 20
"""Multiply-adds of the largest tile, and how many, a third of it, tell a loop to be a product's."""

_JUMP = re.compile(r"(?:b\.\w+|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <")
_MULTIPLY_ADD = re.compile(r"fmla\s+v\d+\.(4s|2d),")
_VECTOR_ON_STACK = re.compile(r"(ldr|str|ldp|stp)\s+q\d+,.*\[(sp|x29)")


def innermost_loops(unit: Path) -> Iterator[tuple[str, list[str]]]:
    """Each one's function and instructions."""
    listing = subprocess.check_output(
        ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(unit)], text=True
    )
    for function in listing.split("\n\n"):
        name, *lines = function.strip().splitlines()
        code = [line.partition("\t") for line in lines if "\t" in line]
        places = {address.strip(" :"): place for place, (address, _, _) in enumerate(code)}
        start = -1
        for end, (_, _, instruction) in enumerate(code):
            jump = _JUMP.match(instruction)
            to = places.get(jump[1], end + 1) if jump else end + 1
            # One that begins before the last loop is around it.
            if start < to <= end:
                start = to
                yield name, [instruction for _, _, instruction in code[start : end + 1]]


def faults(unit: Path) -> Iterator[str]:
    """What is wrong with the loops of a unit's products, in words; prints how long they are."""
    lengths: dict[int, set[int]] = {}
    for name, loop in innermost_loops(unit):
        sums = sum(_MULTIPLY_ADD.match(instruction) is not None for instruction in loop)
        if sums < FEWEST or 3 * sums < len(loop):
            continue
        lengths.setdefault(sums, set()).add(len(loop))
        if any(map(_VECTOR_ON_STACK.match, loop)):
            yield f"{unit.stem}: a loop of {sums} multiply-adds has vectors on the stack: {name}"
    for sums, found in sorted(lengths.items()):
        print(f"{unit.stem}: {sums} multiply-adds in {min(found)} to {max(found)} instructions")
    if LARGEST not in lengths:
        yield f"{unit.stem}: no loop with {LARGEST} multiply-adds of vectors"


def main() -> int:
    if compiling.COMPILER is None or EMULATOR is None:
        print("make aarch64: skipped: there is no aarch64-linux-gnu-g++, or no qemu-aarch64")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        objects = compiling.compile_units(folder, *FLAGS)
        wrong = [fault for unit in objects if unit.stem in UNITS for fault in faults(unit)]
        for name, count in PROGRAMS.items():
            program = compiling.link_program(name, objects, folder, "-O2", "-static")
            print(f"aarch64: {name} {count}", flush=True)
            if subprocess.run([EMULATOR, program, count]).returncode != 0:
                wrong.append(f"{name} failed")
    for fault in wrong:
        print("make aarch64:", fault, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
