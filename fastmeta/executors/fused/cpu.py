"""The fused executor of this processor: the whole meta-step of an MLP in one call of C++."""

from __future__ import annotations

import torch

from fastmeta.executors import base
from fastmeta.executors.base import NetworkExecutor, NotSupported, Offer
from fastmeta.executors.extension import extension
from fastmeta.executors.fused import front as fronts
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
        front, network = fronts.split(base.layers(reading), problem)
        lowered = lower(reading, problem, network)
        if extension() is None:
            raise NotSupported(
                "the compiled extension is not there; `python -m fastmeta info` says why"
            )
        given = problem if front is None else front.shaped(problem)
        support.check(given, lowered)
        if problem.low_memory:
            kernel.check_flat(given, lowered)
        flows = front is not None and front.flows(problem)
        made = kernel.kernel(given, lowered, problem.low_memory, flows)
        before = 0.0 if front is None else front.seconds(problem)
        behind = "" if front is None or not front.nodes else ", behind layers that torch runs once"
        return Offer(
            executor=self.name,
            form="fused",
            seconds=CALL + made.step.seconds + before,
            workspace_bytes=made.step.storage_bytes,
            description=made.description + behind,
            run=lambda problem: step.run(problem, made, front),
            at_a_time=made.step.tasks,
            body_flops=made.body_flops,
            checks_labels=True,
            timeable=bool(behind),
            unrecordable="it runs on the processor",
        )
