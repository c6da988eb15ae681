"""The fused executor of this processor: the whole meta-step of an MLP in one call of C++."""

from __future__ import annotations

import torch

from fastmeta.executors.base import NetworkExecutor, NotSupported, Offer
from fastmeta.executors.extension import extension
from fastmeta.executors.fused import kernel, step, support
from fastmeta.executors.fused.lowering import lower
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading

CALL = 1e-4
"""Seconds that the Python around a call of the kernels takes."""


class FusedCpu(NetworkExecutor):
    """Tasks spread over threads, and in each over the lanes of vectors."""

    name = "fused-cpu"
    family = "fused"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        lowered = lower(reading, problem)
        if extension() is None:
            raise NotSupported(
                "the compiled extension is not there; `python -m fastmeta info` says why"
            )
        support.check(problem, lowered)
        if problem.low_memory:
            kernel.check_flat(problem, lowered)
        made = kernel.kernel(problem, lowered, problem.low_memory)
        return Offer(
            executor=self.name,
            form="fused",
            seconds=CALL + made.step.seconds,
            workspace_bytes=made.step.storage_bytes,
            description=made.description,
            run=lambda given: step.run(given, made),
            at_a_time=made.step.tasks,
            body_flops=made.body_flops,
            checks_labels=True,
            unrecordable="it runs on the processor",
        )
