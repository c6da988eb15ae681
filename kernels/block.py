"""Launches of the passes behind a convolution: images `[T, N, C, H, W]`, channels last in memory.

Numbers of channels are `[T, C]`, or `[1, C]` where the tasks share them. Sums are made in parts,
one a program, that torch adds: the same bits at every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.kernels import block_passes as passes
from fastmeta.kernels.launch import on_device

OPTIONS = {"maxnreg": 255}
"""Left to itself, ptxas spills to stay at 72 registers."""


@dataclass(frozen=True)
class Block:
    """Batch norm by the set's statistics, then `f(z) = z or slope z`, then maxima of windows.

    A slope of 1 is no activation, and a window of (1, 1) no pooling.
    """

    eps: float
    slope: float
    window: tuple[int, int]


@dataclass(eq=False)
class Pass:
    """One pass of a block: where it is evaluated, and what its rules leave for later ones."""

    block: Block
    x: Tensor  # [T, N, H, W, C], as all images here
    weight: Tensor
    bias: Tensor
    statistics: Tensor  # [2, T, C], as all sums
    kept: Tensor  # int8, of windows
    dy: Tensor | None = None
    sums: Tensor | None = None
    rx: Tensor | None = None
    moved: Tensor | None = None
    along: Tensor | None = None


def tiles(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a program: pixels and channels. By what fits into registers; none was measured."""
    if dtype == torch.float64:
        return {"BM": 32, "BC": 16}
    return {"BM": 64, "BC": 16} if channels <= 16 else {"BM": 32, "BC": 32}


def forward(
    block: Block, x: Tensor, partial: Tensor, rows: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Pass]:
    """The output, from a convolution's `x` and `partial`, its statistics by blocks of `rows`."""
    x = _dense(x)
    tasks, count, height, width, channels = x.shape
    statistics = x.new_empty(2, tasks, channels)
    tile = {"BM": 32, "BC": 32}
    with on_device(x):
        passes.statistics_kernel[-(-channels // tile["BC"]), tasks](
            statistics, partial, partial.shape[1], count * height * width, rows, channels,
            EPS=block.eps, **tile, **OPTIONS,
        )  # fmt: skip
    y = x.new_empty(tasks, count, height // block.window[0], width // block.window[1], channels)
    done = Pass(block, x, weight, bias, statistics, torch.empty_like(y, dtype=torch.int8))
    _launch(
        passes.forward_kernel, y, done, y, done.kept, x, statistics, *_strided(weight, bias),
        **_constants(block),
    )  # fmt: skip
    return y.movedim(-1, 2), done


def backward_sums(done: Pass, dy: Tensor) -> Tensor:
    """S(dz) and S(h dz), the gradients of bias and weight: `[2, T, C]`."""
    done.dy = _dense(dy)
    done.sums = _sums(done, done.dy, tangent=False)
    return done.sums


def backward(done: Pass) -> Tensor:
    """The gradient by x."""
    return _backward(done, None, None)


def tangent(done: Pass, rx: Tensor, along: Tensor | None, shift: Tensor | None) -> Tensor:
    """The output's tangent, from those of x, weight and bias."""
    x, done.rx = done.x, _dense(rx)
    parts = _parts(x)
    _launch(passes.moved_kernel, x, done, parts, x, done.rx, done.statistics)
    done.moved = parts.sum(2)
    done.along = torch.zeros_like(done.weight[:1]) if along is None else along
    shift = torch.zeros_like(done.weight[:1]) if shift is None else shift
    ry = done.kept.new_empty(done.kept.shape, dtype=x.dtype)
    _launch(
        passes.tangent_kernel, ry, done, ry, done.kept, x, done.rx, done.statistics, done.moved,
        *_strided(done.weight, done.along, shift), **_constants(done.block),
    )  # fmt: skip
    return ry.movedim(-1, 2)


def tangent_sums(done: Pass, rdy: Tensor) -> Tensor:
    """The tangents of S(dz) and S(h dz)."""
    return _sums(done, _dense(rdy), tangent=True)


def tangent_backward(done: Pass, rdy: Tensor, rsums: Tensor) -> Tensor:
    """The tangent of the gradient by x."""
    return _backward(done, _dense(rdy), rsums)


def _sums(done: Pass, dy: Tensor, tangent: bool) -> Tensor:
    assert done.dy is not None
    parts = _parts(dy)
    rx, moved = (done.rx, done.moved) if tangent else (done.x, done.statistics)
    _launch(
        passes.sums_kernel, dy, done, parts, done.dy, done.kept, done.x, done.statistics, dy, rx,
        moved, TANGENT=tangent, **_constants(done.block),
    )  # fmt: skip
    return parts.sum(2)


def _backward(done: Pass, rdy: Tensor | None, rsums: Tensor | None) -> Tensor:
    dx, tangent = torch.empty_like(done.x), rdy is not None
    along = done.along if tangent else done.weight
    assert along is not None
    weight, along, weight_task, along_task = _strided(done.weight, along)
    _launch(
        passes.backward_kernel, dx, done, dx, done.dy, done.kept, done.x, done.statistics, weight,
        done.sums, rdy if tangent else done.dy, done.rx if tangent else done.x,
        done.moved if tangent else done.statistics, along, rsums if tangent else done.sums,
        weight_task, along_task, TANGENT=tangent, **_constants(done.block),
    )  # fmt: skip
    return dx.movedim(-1, 2)


def _launch(kernel: Any, over: Tensor, done: Pass, *given: Any, **constants: Any) -> None:
    """A program a tile of `over`; what follows what is `given` is the size of x."""
    tasks, channels = over.shape[0], over.shape[-1]
    _, count, height, width, _ = done.x.shape
    with on_device(over):
        kernel[_programs(over), tasks](
            *given,
            count,
            height,
            width,
            channels,
            **constants,
            **tiles(channels, done.x.dtype),
            **OPTIONS,
        )


def _constants(block: Block) -> dict[str, Any]:
    return {"KH": block.window[0], "KW": block.window[1], "SLOPE": block.slope}


def _programs(over: Tensor) -> int:
    channels = over.shape[-1]
    tile = tiles(channels, over.dtype)
    return -(-over[0, ..., 0].numel() // tile["BM"]) * -(-channels // tile["BC"])


def _parts(over: Tensor) -> Tensor:
    """Room for two sums of each program, `[2, T, blocks, C]`."""
    channels = over.shape[-1]
    blocks = -(-over[0, ..., 0].numel() // tiles(channels, over.dtype)["BM"])
    return over.new_empty(2, len(over), blocks, channels)


def _strided(*numbers: Tensor) -> list[Any]:
    """Numbers of channels, then their strides from task to task."""
    given = [each.contiguous() for each in numbers]
    return [*given, *(0 if len(each) == 1 else each.shape[1] for each in given)]


def _dense(x: Tensor) -> Tensor:
    return x.movedim(2, -1).contiguous()
