"""The convolutional executor of this processor: all tasks of a meta-step in one call of C++."""

from __future__ import annotations

import torch

from fastmeta.executors import packing
from fastmeta.executors.base import NetworkExecutor, NotSupported, Offer, layers_and_losses
from fastmeta.executors.convolutional import kernel
from fastmeta.executors.convolutional.blocks import blocks
from fastmeta.executors.extension import extension
from fastmeta.executors.generic import cost
from fastmeta.executors.layers import support
from fastmeta.executors.layers.lowering import lower
from fastmeta.executors.problem import Problem
from fastmeta.network.reading import Reading
from fastmeta.wording import counted

_OF_GENERIC = 0.25
"""Its time as a part of the general path's, at most, on the networks of `python -m bench.layered`:
what the C++ estimates of itself leaves out the bandwidth of memory."""


class ConvolutionalCpu(NetworkExecutor):
    """Chains of blocks, and residual sums of such, a task a thread."""

    name = "layered-cpu"
    family = "layered"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        _, *losses = layers_and_losses(reading)
        layers = lower(reading)
        network = blocks(layers.nodes, layers.output, losses, reading.example, reading.sizes)
        support.check(problem, layers)
        tasks = problem.tasks
        if extension() is None:
            raise NotSupported(
                "the compiled extension is not there; `python -m fastmeta info` says why"
            )
        last = network.blocks[-1].filters
        if problem.keep_adapted and problem.differentiate:
            raise NotSupported("adapted parameters and a meta-gradient are asked for")
        if problem.low_memory and problem.second_order and problem.inner.steps > 1:
            raise NotSupported(
                "memory='low' asks for memory flat in K, and it keeps every inner step's "
                "activations"
            )
        for examples in tasks.sets():
            if tuple(examples.inputs.shape[2:]) != network.blocks[0].image:
                raise NotSupported("inputs are not one image an example")
            loss = network.loss if examples is tasks.support else network.query_loss
            loss.check(problem, examples, (last,), problem.task_weights.dtype)
            packing.check_rows(examples, loss, (last,))
        made = kernel.kernel(problem, network)
        step = made.step
        return Offer(
            executor=self.name,
            form="layered",
            seconds=_OF_GENERIC * cost.cheapest(reading.profile, problem),
            workspace_bytes=step.storage_bytes,
            description=f"{step.instruction_set}, {counted(step.body, 'block')} run once",
            run=lambda given: kernel.run(given, made),
            at_a_time=tasks.rounded,
            body_flops=made.body_flops,
            checks_labels=True,
            unrecordable="it runs on the processor",
        )
