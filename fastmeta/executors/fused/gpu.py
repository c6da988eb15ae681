"""The fused executor of a GPU: the whole meta-step of an MLP in one launch of CUDA kernels."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from fastmeta.executors.base import NetworkExecutor, NotSupported, Offer
from fastmeta.executors.fused import cuda, cuda_step, support
from fastmeta.executors.fused.cpu import CALL
from fastmeta.executors.fused.lowering import check_chain, lower
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading


class FusedCuda(NetworkExecutor):
    """A task a block, and its numbers in shared memory where they fit."""

    name = "fused-cuda"
    family = "fused"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def module(self) -> ModuleType | None:
        """The compiled kernels, where this installation has them."""
        try:
            return importlib.import_module("fastmeta._cuda")
        except ImportError:
            return None

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        lowered = lower(reading, problem)
        check_chain(lowered)
        support.check(problem, lowered)
        module, device = self.module(), problem.task_weights.device
        if module is None:
            raise NotSupported("the CUDA kernels are not there; `python -m fastmeta info` says why")
        if len(lowered.layers) > module.most_layers:
            raise NotSupported(
                f"it has {len(lowered.layers)} layers, the CUDA kernels take {module.most_layers}"
            )
        try:
            limits = self.limits(module, device)
        except RuntimeError as error:
            raise NotSupported(str(error)) from error
        made = cuda.kernel(problem, lowered, module, limits)
        if not made.step.serves:
            raise NotSupported(
                f"a task takes {made.step.task_bytes:,} bytes of shared memory, a block on "
                f"{device} has {limits[0]:,}, and a layer is wider than 512"
            )
        return Offer(
            executor=self.name,
            form="fused",
            seconds=CALL,  # the general path takes thousands of launches: it is never faster
            workspace_bytes=made.step.blocks * made.step.task_bytes,
            description=made.description,
            run=lambda given: cuda_step.run(given, made),
            at_a_time=made.step.blocks,
            body_flops=made.body_flops,
            checks_labels=True,  # its task's loss is NaN
        )

    def limits(self, module: ModuleType, device: torch.device) -> tuple[int, int]:
        """The bytes of shared memory that a block may take, and the number of multiprocessors.

        **Raises** `RuntimeError`, which says why, where the device can't run the kernels.
        """
        with cuda.guard(device):
            return _limits(module, cuda.index(device))


@functools.lru_cache(maxsize=64)
def _limits(module: ModuleType, device: int) -> tuple[int, int]:
    return module.limits(device)
