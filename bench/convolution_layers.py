"""Speed of each layer of a convolutional network, rule by rule, beside the core's products.

python -m bench.convolution_layers                              W5, W5s and W6, 5 and 75 examples
python -m bench.convolution_layers --only W5s --examples 75

The kernels of csrc/cpu/conv are compiled for this very processor around convolution_layers.cpp.
Times are of the thread alone. GFLOP/s count direct convolutions, taps outside of an image included,
whatever way they are computed in; passes of norm, activation and pooling are in the time. A rule
that is called again and again finds its data in nearer caches than a whole step does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bench import cores, measure, table
from bench.growth import floor, steps
from bench.workloads import WORKLOADS
from fastmeta.executors.base import NotSupported
from fastmeta.executors.convolutional.blocks import Block, blocks
from fastmeta.executors.layers.lowering import lower

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-Wno-psabi")
RULES = ("forward", "backward", "tangent forward", "tangent backward")


def build(folder: Path) -> Path:
    """The driver around this checkout's kernels."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("convolution_layers: no C++ compiler; install g++, or set CXX to one")
    program = folder / "convolution_layers"
    units = ("csrc/cpu/conv/layout.cpp", "csrc/cpu/conv/shapes.cpp", "csrc/cpu/interrupt.cpp")
    sources = [ROOT / "bench/convolution_layers.cpp", *(ROOT / unit for unit in units)]
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def described(block: Block) -> str:
    """A block in the driver's terms."""
    numbers = [*block.image, block.filters]
    for pair in (block.kernel, block.stride, block.padding, block.window):
        numbers += pair
    below = 1.0 if block.below is None else block.below
    return " ".join(map(str, [*numbers, int(block.mean), int(block.norm is not None), below]))


def chain(name: str) -> tuple[Block, ...]:
    reading = steps.planned(WORKLOADS[name], "layered").selected.reading
    lowered, found = lower(reading), tuple[Block, ...]()
    with suppress(NotSupported):
        found = blocks(
            lowered.nodes, lowered.output, lowered.loss, reading.example, reading.sizes
        ).blocks
    reads = [(block.source, block.plus) for block in found]
    if not found or reads != [(i - 1, None) for i in range(len(found))]:
        raise SystemExit(f"convolution_layers: {name} is no chain of convolutional blocks")
    return found


def rows(program: Path, name: str, examples: int, seconds: float) -> list[list[str]]:
    """A row a layer: its image, then milliseconds and GFLOP/s of each rule."""
    network = chain(name)
    run = subprocess.run(
        [program, str(examples), str(seconds), *map(described, network)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[int, list[str]] = {}
    for line in run.stdout.splitlines():
        layer, _, ms, products = line.split(",")
        cell = f"{float(ms):.3f} ({2e-6 * int(products) / float(ms):.0f})"
        found.setdefault(int(layer), []).append(cell)
    return [
        [name, str(examples), "{}x{}x{}".format(*network[layer].image), *cells]
        for layer, cells in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="workloads, comma-separated", default="W5,W5s,W6")
    parser.add_argument("--examples", help="in a set, comma-separated", default="5,75")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each network")
    args = parser.parse_args()
    cores.restrict(1)
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for name in args.only.split(","):
            for examples in map(int, args.examples.split(",")):
                found += rows(program, name, examples, args.seconds)
    side = floor.SIDES[-1]
    products = measure.interleaved(
        dict(floor.large_products(side)), args.seconds, clock=time.thread_time
    )
    print(
        table.markdown(
            ["workload", "examples", "image", *(f"{r}, ms (GFLOP/s)" for r in RULES)], found
        )
    )
    print(f"\nA large product: {max(2e-6 * side**3 / ms for ms in products.values()):.0f} GFLOP/s.")


if __name__ == "__main__":
    main()
