"""The compiled step of a GPU: where it is, what it declines, and its kernel for a problem."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import rates
from fastmeta.executors.fused.kernel import Kernel, described, environment
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Problem
from fastmeta.precision import of_products

NO_STREAM = 0
"""The default stream's address, and what a host that plays the device is given."""


def on_host() -> bool:
    """Whether tests have the CUDA kernels executed on the host, for tensors that lie there."""
    return os.environ.get("FASTMETA_CUDA_ON_HOST", "") == "1"


def takes(device: torch.device) -> bool:
    """Whether tensors there are for the CUDA kernels, be these there or not."""
    return device.type == "cuda" or on_host()


def extension() -> ModuleType | None:
    """The CUDA kernels, where this installation has them."""
    try:
        return importlib.import_module("fastmeta._cuda_on_host" if on_host() else "fastmeta._cuda")
    except ImportError:
        return None


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The address of torch's current stream there."""
    if device.type != "cuda":
        return NO_STREAM
    return torch.cuda.current_stream(device).cuda_stream


def capturing(device: torch.device) -> bool:
    """Whether torch's current stream there is being recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def index(device: torch.device) -> int:
    """A device's number; 0 for a host that plays it."""
    return device.index or 0


def limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a block may take there, and how many multiprocessors there are.

    **Raises** `RuntimeError`, which says why, where the device can't run the kernels.
    """
    module = extension()
    assert module is not None
    with guard(device):
        if on_host():  # where tests set them
            return module.limits(index(device))
        return _limits(module, index(device))


@functools.lru_cache(maxsize=64)
def _limits(module: ModuleType, device: int) -> tuple[int, int]:
    return module.limits(device)


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why the CUDA kernels can't take this problem; None where they can."""
    module, device = extension(), problem.task_weights.device
    if module is None:
        return "the CUDA kernels are not there; `python -m fastmeta info` says why"
    if len(recipe.layers) > module.most_layers:
        return f"it has {len(recipe.layers)} layers, the CUDA kernels take {module.most_layers}"
    try:
        limit, _ = limits(device)
    except RuntimeError as error:
        return str(error)
    step = kernel(problem, recipe).step
    if not step.serves:
        return (
            f"a task takes {step.task_bytes:,} bytes of shared memory, a block on {device} has "
            f"{limit:,}, and a layer is wider than 512"
        )
    return None


def rounds(dtype: torch.dtype) -> bool:
    """Whether the kernels' products of this type are in TF32, as torch's switches are now."""
    return of_products(dtype) != "ieee"


@dataclass(frozen=True, eq=False)
class CudaKernel(Kernel):
    """The kernel of a GPU, with what it keeps in device memory."""

    device: torch.device = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    image: Tensor = field(kw_only=True)
    """The network and its layout, as the kernel reads them."""
    _step_weights: list[tuple[Hashable, Tensor]] = field(default_factory=list)

    def step_weights(self, weights: tuple[float, ...], like: Tensor) -> Tensor:
        """The step weights on the device; made anew for other numbers."""

        def make() -> Tensor:
            packed = like.new_zeros(len(weights))
            for k, weight in enumerate(weights):
                if weight != 0:
                    packed[k].fill_(weight)  # a copy from the host would wait for the device
            return packed

        return self._kept(self._step_weights, weights, make)

    def _kept(
        self, last: list[tuple[Hashable, Tensor]], key: Hashable, make: Callable[[], Tensor]
    ) -> Tensor:
        """Of this stream, because another would not wait for it; a graph makes its own."""
        if capturing(self.device):
            _in_graphs.add(self)
            return make()
        return super()._kept(last, (key, stream(self.device)), make)

    @property
    def executor(self) -> str:
        """As results report it."""
        return "fused-cuda-on-host" if self.device.type == "cpu" else "fused-cuda"

    @property
    def words(self) -> str:
        """The kernel, for `explain`."""
        step = self.step
        form = "dual" if step.dual else "primal"
        numbers = "TF32" if rounds(self.dtype) else str(self.dtype).removeprefix("torch.")
        return (
            f"cuda, a task a block in {'device' if step.workspace else 'shared'} memory, "
            f"{step.blocks} blocks of {step.threads} threads, products in {numbers}, first layer "
            f"{form}, inner loop {step.memory}"
        )

    @property
    def storage_bytes(self) -> int:
        """Of a task."""
        return self.step.task_bytes

    @property
    def group(self) -> tuple[int, int, float]:
        """All tasks at a time, a task's bytes, and no estimate of seconds.

        The general path takes thousands of launches for a step: it is never the faster one.
        """
        return self.step.blocks, self.step.task_bytes, 0.0


_in_graphs: set[CudaKernel] = set()
"""Kernels that graphs may launch again: these know the address of their image."""


def kernel(problem: Problem, recipe: Recipe, low_memory: bool = False) -> CudaKernel:
    """The kernel for this problem's sizes and options on its device."""
    inner, tasks, device = problem.inner, problem.tasks, problem.task_weights.device
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    form, memory = environment()[2:4]
    step, image = _step(
        recipe,
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
        memory or ("reversible" if low_memory else ""),
        os.environ.get("FASTMETA_CUDA_STORAGE", ""),
        int(os.environ.get("FASTMETA_CUDA_THREADS", "0")),
        device,
        limits(device),
    )
    # The recipe at hand, not the one that the step was first made for: the loss's weights differ.
    return CudaKernel(
        recipe, step, recipe.names(), evaluates, recipe.norms(), device=device,
        dtype=problem.task_weights.dtype, image=image,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _step(
    recipe: Recipe, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int,
    evaluates: tuple[bool, ...], form: str, memory: str, storage: str, threads: int,
    device: torch.device, limits: tuple[int, int],
) -> tuple[Any, Tensor]:  # fmt: skip
    module = extension()
    assert module is not None
    step = module.CudaStep(
        *described(recipe, adapted), *sizes, *flags, prox, is_double, tasks, evaluates, form,
        memory, storage, threads, limits,
    )  # fmt: skip
    image = torch.empty(len(step.image(0)), dtype=torch.uint8, device=device)
    image.copy_(torch.frombuffer(bytearray(step.image(image.data_ptr())), dtype=torch.uint8))
    return step, image
