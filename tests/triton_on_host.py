"""Triton's kernels on the host: its interpreter (see conftest.py), and single operations in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 only")
import triton.language as tl
import triton.runtime.interpreter as interpreter

from fastmeta.executors.fused.operations.table import Table
from fastmeta.executors.fused.operations.views import Space, View
from fastmeta.kernels import launch

_patch_tensor = interpreter._patch_lang_tensor


def _with_an_index(tensor, *rest):
    _patch_tensor(tensor, *rest)
    # Triton 3.6 calls int() on an array of one number, which NumPy 2.4 refuses.
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _with_an_index

_dot = interpreter.InterpreterBuilder.create_dot


def _dot_of_bfloat16(builder, a, b, *rest):
    # It keeps bfloat16 as integers, and Triton 3.6 multiplies those.
    return _dot(builder, *(_widened(builder, side) for side in (a, b)), *rest)


def _widened(builder, side):
    return builder.cast_impl(side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side


interpreter.InterpreterBuilder.create_dot = _dot_of_bfloat16

TASKS = 2


class Machine:
    """A buffer with matrices of `TASKS` tasks, and a table of operations on them."""

    def __init__(self) -> None:
        self._space = Space(TASKS)
        self._filled: list[tuple[View, Tensor]] = []
        self.zero, self.one = self.given(torch.zeros(1, 1)), self.given(torch.ones(1, 1))
        self.table = Table(self.one)

    def given(self, matrix: Tensor) -> View:
        """[T, rows, cols], or [rows, cols] where the tasks share it."""
        view = (self._space.shared if matrix.dim() == 2 else self._space.of_tasks)(
            *matrix.shape[-2:]
        )
        self._filled.append((view, matrix))
        return view

    def room(self, rows: int, cols: int) -> View:
        """A matrix for an operation to write."""
        return self._space.of_tasks(rows, cols)

    def run(self, dtype: torch.dtype = torch.float64) -> None:
        """Works through the table, on a buffer that holds no number where nothing was given."""
        self._buffer = torch.full((self._space.size,), torch.nan, dtype=dtype)
        for view, matrix in self._filled:
            self._buffer[view.offset : view.offset + matrix.numel()] = matrix.flatten().to(dtype)
        launch.step(self._buffer, *self.table.tensors(), TASKS)

    def read(self, view: View) -> Tensor:
        """[T, rows, cols]."""
        size = (TASKS, view.rows, view.cols)
        return self._buffer.as_strided(size, (view.task, view.row, view.col), view.offset).clone()
