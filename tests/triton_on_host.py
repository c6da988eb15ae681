"""Triton's kernels on the host: its interpreter, mended (see conftest.py)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 only")
import triton.language as tl
import triton.runtime.interpreter as interpreter

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
