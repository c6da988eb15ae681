"""Triton's kernels on the host: its interpreter, mended, and an executor that runs in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux x86-64 only")
import triton.language as tl
import triton.runtime.interpreter as interpreter

from fastmeta.executors.base import Executor, Offer
from fastmeta.executors.convolutional.cpu import ConvolutionalCpu
from fastmeta.executors.every import EXECUTORS
from fastmeta.executors.layers import many
from fastmeta.executors.layers.offers import LayersTriton
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading

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


class LayersTritonOnHost(LayersTriton):
    """Triton's kernels in its interpreter, for tensors that lie on the host."""

    name = "layered-triton-on-host"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def missing(self, device: torch.device) -> str | None:
        return None

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        # The interpreter's time says nothing.
        return replace(super().make_offer(reading, problem), timeable=False)


def played(executors: list[Executor]) -> list[Executor]:
    """The executors with this one, and without the processor's own for convolutions."""
    return [
        LayersTritonOnHost() if isinstance(executor, LayersTriton) else executor
        for executor in executors
        if not isinstance(executor, ConvolutionalCpu)
    ]


def lists_at_once(parts: many.Parameters) -> bool:
    """In the place of `many._at_once`: what a GPU does with lists of tensors."""
    return bool(parts)


def register() -> None:
    """Has it play for the whole process."""
    EXECUTORS[:] = played(EXECUTORS)
    many._at_once = lists_at_once
