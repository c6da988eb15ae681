"""Launches: tensors in, on torch's current stream, under their device."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from fastmeta.kernels.record import FIELDS, NUMBERS
from fastmeta.kernels.step import step_kernel
from fastmeta.kernels.sums import sum_kernel
from fastmeta.precision import of_products

STEP = {"BM": 32, "BN": 32, "BK": 32}
SUM = {"BT": 32, "BP": 64}


def options(dtype: torch.dtype) -> dict[str, int]:
    """How the step's kernel is compiled: left to itself, ptxas spills to stay at 128 registers."""
    if dtype == torch.float64:
        return {"num_warps": 8, "num_stages": 1, "maxnreg": 255}
    return {"num_warps": 4, "num_stages": 1, "maxnreg": 232}


def step(buffer: Tensor, operations: Tensor, numbers: Tensor, tasks: int) -> None:
    """Works through the table `[n, FIELDS]`, `[n, NUMBERS]`, a program a task."""
    count = operations.shape[0]
    assert operations.shape[1] == FIELDS.value
    assert numbers.shape == (count, NUMBERS.value)
    with on_device(buffer):
        step_kernel[(tasks,)](
            buffer, operations, numbers, count,
            PRECISION=of_products(buffer.dtype), **STEP, **options(buffer.dtype),
        )  # fmt: skip


def sum_tasks(out: Tensor, buffer: Tensor, weights: Tensor, start: int, stride: int) -> None:
    """`out[p] = sum_t weights[t] * buffer[start + t * stride + p]`."""
    count = out.numel()
    grid = (-(-count // SUM["BP"]),)
    with on_device(buffer):
        sum_kernel[grid](out, buffer, weights, start, stride, weights.numel(), count, **SUM)


def on_device(tensor: Tensor):
    """Makes the tensor's GPU the current one, where it lies on one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
