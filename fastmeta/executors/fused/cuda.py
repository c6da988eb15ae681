"""The compiled step of a GPU: its kernel for a problem, and the device that it runs on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import rates, update_rule
from fastmeta.executors.fused.kernel import Kernel, described, environment, query_loss
from fastmeta.executors.fused.lowering import Lowered
from fastmeta.executors.problem import Problem
from fastmeta.precision import of_products

NO_STREAM = 0
"""The default stream's address, and what tensors on the processor have."""


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The address of torch's current stream there."""
    if device.type != "cuda":
        return NO_STREAM
    return torch.cuda.current_stream(device).cuda_stream


def capturing(device: torch.device) -> bool:
    """Return whether torch's current stream there is being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def index(device: torch.device) -> int:
    """A device's number."""
    return device.index or 0


def rounds(dtype: torch.dtype) -> bool:
    """Return whether products of this type are in TF32, as torch's switches are now."""
    return of_products(dtype) != "ieee"


@dataclass(frozen=True, eq=False)
class CudaKernel(Kernel):
    """The kernel of a GPU, with what it keeps in device memory."""

    device: torch.device = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    image: Tensor = field(kw_only=True)
    """The network and its layout, as the kernel reads them."""
    _step_weights: list[tuple[Hashable, Tensor]] = field(default_factory=list)
    _rule_options: list[tuple[Hashable, Tensor]] = field(default_factory=list)

    def step_weights(self, weights: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        """The step weights on the device; made anew for other numbers."""
        return self._kept(self._step_weights, weights, lambda: self._filled(weights, dtype))

    def rule_options(self, options: tuple[float, ...]) -> Tensor:
        """The numbers of the update rule on the device; made anew for others."""
        make = self._filled
        return self._kept(self._rule_options, options, lambda: make(options, torch.float64))

    def _filled(self, numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        packed = torch.zeros(len(numbers), dtype=dtype, device=self.device)
        for k, number in enumerate(numbers):
            if number != 0:
                packed[k].fill_(number)  # a copy from the host would wait for the device
        return packed

    def _kept(
        self, last: list[tuple[Hashable, Tensor]], key: Hashable, make: Callable[[], Tensor]
    ) -> Tensor:
        """The tensor of this stream, as another would not wait for it; a graph makes its own."""
        if capturing(self.device):
            _in_graphs.add(self)
            return make()
        return super()._kept(last, (key, stream(self.device)), make)

    @property
    def description(self) -> str:
        """The kernel in words."""
        step = self.step
        form = "dual" if step.dual else "primal"
        numbers = "TF32" if rounds(self.dtype) else str(self.dtype).removeprefix("torch.")
        return (
            f"cuda, a task a block in {'device' if step.workspace else 'shared'} memory, "
            f"{step.blocks} blocks of {step.threads} threads, products in {numbers}, first layer "
            f"{form}, inner loop {step.memory}"
        )


_in_graphs: set[CudaKernel] = set()
"""Kernels that graphs may launch again: these know the address of their image."""


def kernel(
    problem: Problem, lowered: Lowered, module: ModuleType, limits: tuple[int, int]
) -> CudaKernel:
    """The kernel for this problem's sizes and options on its device.

    `limits`: the bytes of shared memory that a block may take there, and how many multiprocessors
    there are.
    """
    inner, tasks, device = problem.inner, problem.tasks, problem.task_weights.device
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    form, memory = environment()[2:4]
    step, image = _step(
        module,
        lowered,
        inner.adapted,
        (tasks.support.count, tasks.query.count if tasks.query else 0, inner.steps),
        (
            problem.differentiate,
            inner.first_order,
            rates.elementwise(inner),
            problem.differentiate and bool(inner.learned_rates()),
        ),
        inner.prox,
        problem.task_weights.dtype == torch.float64,
        tasks.tasks,
        evaluates,
        form,
        memory or ("reversible" if problem.low_memory else ""),
        os.environ.get("FASTMETA_CUDA_STORAGE", ""),
        int(os.environ.get("FASTMETA_CUDA_THREADS", "0")),
        device,
        limits,
        update_rule.describe(inner, problem.differentiate).description,
        tasks.per_step is not None,
    )
    # The network at hand, not the one that the step was first made for: the loss's weights differ.
    return CudaKernel(
        lowered, step, lowered.names(), evaluates, lowered.norms(), draws=False, device=device,
        dtype=problem.task_weights.dtype, image=image,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _step(
    module: ModuleType, lowered: Lowered, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int,
    evaluates: tuple[bool, ...], form: str, memory: str, storage: str, threads: int,
    device: torch.device, limits: tuple[int, int], rule: update_rule.Description,
    per_step_support: bool,
) -> tuple[Any, Tensor]:  # fmt: skip
    step = module.CudaStep(
        *described(lowered, adapted, is_double), *sizes, *flags, prox, is_double, tasks, evaluates,
        form, memory, storage, threads, limits, rule, per_step_support, query_loss(lowered),
    )  # fmt: skip
    image = torch.empty(len(step.image(0)), dtype=torch.uint8, device=device)
    image.copy_(torch.frombuffer(bytearray(step.image(image.data_ptr())), dtype=torch.uint8))
    return step, image
