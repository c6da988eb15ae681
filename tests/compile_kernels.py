"""Every Triton kernel compiled ahead for three generations of GPUs, without one: `make kernels`.

Each fits, and no register is spilt. A kernel knows an image's size only when it runs, and its tiles
are of a short list: so this holds for every network, as far as its images fit into the memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastmeta.kernels import block, block_passes, tiles
from fastmeta.kernels.convolutions import convolve_kernel, weight_gradient_kernel

CAPABILITIES = (80, 90, 100)
KERNELS = {
    "convolve_kernel", "weight_gradient_kernel", "statistics_kernel", "forward_kernel",
    "sums_kernel", "backward_kernel", "moved_kernel", "tangent_kernel",
}  # fmt: skip
SHARED = 48 << 10
"""Bytes that a block has on every architecture without asking."""
REGISTERS = 64 << 10
"""Of a multiprocessor."""

TYPES = {torch.float32: "fp32", torch.float64: "fp64"}
PRECISIONS = {torch.float32: ("ieee", "tf32", "bf16"), torch.float64: ("ieee",)}
SIZES = ("BM", "BN", "BK")


def resources(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any],
    options: dict[str, int], multiples: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """`multiples` are the numbers that a call gives as multiples of 16."""
    signature = types | dict.fromkeys(constants, "constexpr")
    # Addresses as torch's allocator gives them.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in multiples
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, GPUTarget("cuda", capability, 32), options)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(re.search(rf"\b{key}:(\d+)", report)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {
        "kernel": kernel.__name__, "capability": capability, **types, **constants,
        "registers": found["REG"], "stack": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps,
    }  # fmt: skip


def all_kernels(capability: int) -> list[dict[str, Any]]:
    return [
        kernel
        for dtype in TYPES
        for kernel in (*convolutions(capability, dtype), *passes(capability, dtype))
    ]


def convolutions(capability: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """In every tile and with all operands; channels are multiples of 16, any number, and one."""
    found: list[dict[str, Any]] = []
    name, channels = TYPES[dtype], dict.fromkeys(("inputs", "outputs"), "i32")
    images = dict.fromkeys(("y", "x", "w", "x2", "w2", "partial"), f"*{name}")
    images |= {"geometry": "*i32", **channels}
    images |= dict.fromkeys(("w_task", "w2_task"), "i32")
    pixels = dict.fromkeys(("dw", "dy", "x", "dy2", "x2"), f"*{name}")
    pixels |= {"geometry": "*i32", **channels, "tasks": "i32", "part": "i32"}
    for precision in PRECISIONS[dtype]:
        # As they are called: two pairs, or one with its statistics.
        two = {"TWO": True, "STATISTICS": False, "PRECISION": precision}
        one = {"TWO": False, "STATISTICS": True, "PRECISION": precision}
        for inputs, outputs in ((16, 16), (32, 32), (64, 64), (5, 5), (5, 40), (1, 64), (64, 1)):
            vectors = inputs % 16 == outputs % 16 == 0
            multiples = ("inputs", "outputs", "w_task", "w2_task") if vectors else ()
            # A call's 1 is a constant for Triton.
            known = {n: 1 for n, size in (("inputs", inputs), ("outputs", outputs)) if size == 1}
            found += [
                resources(
                    convolve_kernel, capability, images, known | which | sizes, options, multiples
                )
                for sizes, options in map(apart, tiles.of_convolution(inputs, outputs, dtype))
                for which in (two, one)
            ]
            known |= {"TWO": True, "PRECISION": precision}
            found += [
                resources(
                    weight_gradient_kernel, capability, pixels, known | sizes, options, multiples
                )
                for sizes, options in map(apart, tiles.of_weight_gradient(inputs, outputs, dtype))
            ]
    return found


def apart(tile: tiles.Tile) -> tuple[dict[str, int], dict[str, int]]:
    """A tile's sizes, and how its program is compiled."""
    return {n: tile[n] for n in SIZES}, {n: tile[n] for n in tile if n not in SIZES}


def passes(capability: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Behind a convolution: by vectors of channels, by any number, and by one."""
    found: list[dict[str, Any]] = []
    kernels = (
        block_passes.forward_kernel, block_passes.sums_kernel, block_passes.backward_kernel,
        block_passes.moved_kernel, block_passes.tangent_kernel,
    )  # fmt: skip
    numbers = ("weight_task", "bias_task", "along_task", "shift_task")
    numbers += ("count", "height", "width", "channels", "blocks", "pixels", "rows")
    for channels, multiples in ((64, ("channels",)), (5, ()), (1, ())):
        known = {"channels": 1} if channels == 1 else {}
        values = {"TANGENT": True, "SLOPE": 0.01, "EPS": 1e-5, **block.tiles(channels, dtype)}
        statistics = block_passes.statistics_kernel
        for kernel in (*kernels, statistics):
            names = kernel.arg_names
            types = {n: f"*{TYPES[dtype]}" for n in names if n not in values and n[0] != "K"}
            types |= {n: "i32" for n in names if n in numbers}
            types |= {n: "*i8" for n in names if n == "kept"}
            windows = {"KH": 2, "KW": 2} if "KH" in names else {}
            constants = {n: v for n, v in values.items() if n in names} | windows | known
            ordered = {n: types[n] for n in names if n in types}
            options = block.OPTIONS
            found.append(resources(kernel, capability, ordered, constants, options, multiples))
    return found


def faults(kernel: dict[str, Any]) -> list[str]:
    """The reasons why a kernel can't run, or runs slowly."""
    found: list[str] = []
    if kernel["stack"]:
        found.append(f"{kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED:
        found.append(f"{kernel['shared']} bytes of shared memory")
    # All of a block's threads find registers, which are handed out by eights.
    if -(-kernel["registers"] // 8) * 8 * kernel["warps"] * 32 > REGISTERS:
        found.append(f"{kernel['registers']} registers, {kernel['warps']} warps")
    return [f"{kernel}: {fault}" for fault in found]


def main() -> int:
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = [each for all_of_one in pool.map(all_kernels, CAPABILITIES) for each in all_of_one]
    failed = [fault for kernel in found for fault in faults(kernel)]
    names = {kernel["kernel"] for kernel in found}
    failed += [f"{name}: not compiled, or not expected" for name in sorted(names ^ KERNELS)]
    print(f"{len(found)} forms of {len(names)} kernels:", *sorted(names))
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
