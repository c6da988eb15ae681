"""The layered executors: each layer's own four rules, in torch's operators or Triton's kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmeta.executors import triton_device
from fastmeta.executors.base import NetworkExecutor, NotSupported, Offer, Unsupported
from fastmeta.executors.generic import cost
from fastmeta.executors.layers import program, support
from fastmeta.executors.layers.linearized import linearized
from fastmeta.executors.layers.lowering import Lowered, lower
from fastmeta.executors.layers.on_triton import on_triton
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import Conv2d
from fastmeta.network.reading import Reading
from fastmeta.wording import counted

_PRIOR = 0.5
"""Its time as a part of the general path's, until it is measured."""


class LayersTorch(NetworkExecutor):
    """All tasks at once, layer by layer, in torch's operators."""

    name = "layered-torch"
    family = "layered"

    def takes(self, device: torch.device) -> bool:
        return True

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        lowered = lower(reading)
        support.check(problem, lowered)
        return self._offer(reading, problem, program.program(problem, lowered))

    def _offer(self, reading: Reading, problem: Problem, made: program.Program) -> Offer:
        body = counted(len(made.parts.body), "layer")
        return Offer(
            executor=self.name,
            form="layered",
            seconds=_PRIOR * cost.cheapest(reading.profile, problem),
            workspace_bytes=sum(made.workspaces),
            description=f"{self._computes_by}, {counted(made.chunk, 'task')} at a time, "
            f"{body} run once",
            run=lambda given: program.run(given, made),
            at_a_time=made.chunk,
            body_flops=made.body_flops,
            last_resort=problem.low_memory,  # its memory is that of several tasks
            timeable=True,
            unrecordable=self._unrecordable,
        )

    def linearize(
        self, reading: Reading, problem: Problem, parameters: Tensors
    ) -> Linearized | Unsupported:
        try:
            lowered = lower(reading)
            support.check(problem.without_unread, lowered)
        except NotSupported as error:
            return Unsupported(str(error))
        return linearized(problem, lowered, parameters)

    _computes_by = "torch's operators"
    _unrecordable = "Triton computes none of its layers"


class LayersTriton(LayersTorch):
    """The same, convolutions and what follows them in Triton's kernels."""

    name = "layered-triton"

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        lowered = lower(reading)
        self._check(lowered, problem.task_weights.device)
        support.check(problem, lowered)
        made = program.program(problem, on_triton(lowered), gives_addresses=True)
        offer = self._offer(reading, problem, made)
        return replace(offer, seconds=0.9 * offer.seconds, checks_labels=True)

    def _check(self, lowered: Lowered, device: torch.device) -> None:
        """**Raises** `NotSupported` where Triton can't compute any layer on the device."""
        if not any(isinstance(node.layer, Conv2d) for node in lowered.nodes):
            raise NotSupported("no layer is a convolution")
        missing = self.missing(device)
        if missing is not None:
            raise NotSupported(missing)

    def missing(self, device: torch.device) -> str | None:
        """The reason why the kernels can't run on the device; None where they can."""
        missing = triton_device.missing()
        return missing[0] if missing else triton_device.too_old(device)

    _computes_by = "Triton and torch's operators"
    _unrecordable = ""
