"""The interface of executors: what computes a step makes an offer, or says why it can't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.graph import Network, Node
from fastmeta.network.layers import Foreign
from fastmeta.network.losses.standard import Loss
from fastmeta.network.reading import Reading


@dataclass(frozen=True)
class Unsupported:
    """An executor's answer where it can't compute a problem."""

    reason: str


COMPILED = "the whole step is compiled"
"""The reason of an executor that leaves a problem to another of its family."""


class NotSupported(Exception):
    """Something that an executor can't compute; the message says why."""


@dataclass(frozen=True, eq=False)
class Offer:
    """An executor's answer where it can compute a problem, and every problem of the same sizes."""

    executor: str
    """The name that results report, for example `"fused-cpu"`."""
    form: str
    """The form of the computation, for example `"vmap"`."""
    seconds: float
    """The estimated time of a step."""
    workspace_bytes: int
    """The estimated memory of a step beside data and parameters."""
    description: str
    """The form in words, for `explain`."""
    run: Callable[[Problem], Outcome]
    """Computes a step."""
    at_a_time: int = 1
    """The number of tasks that are computed together."""
    body_flops: int = 0
    """FLOP of one example's forward pass through the layers that run once a task and set."""
    last_resort: bool = False
    """True where it breaks what was asked for (memory), so that any other offer is taken first."""
    timeable: bool = False
    """True where the estimate leaves open what the time will be, so that measuring pays."""
    may_keep_features: bool = False
    """True where running once what stands in front of the adapting parameters is worth a trial."""
    checks_labels: bool = False
    """True where it deals with labels that are none of the network's classes by itself."""
    unrecordable: str = ""
    """The reason why a CUDA graph can't record it; empty where one can."""


class Executor:
    """One way to compute meta-steps."""

    name: ClassVar[str]
    """The name that tells it from the others."""
    family: ClassVar[str]
    """The `executor=` argument that asks for it."""
    replaces_module: ClassVar[bool] = False
    """True where it computes layers in the module's stead, rather than run the module."""

    def takes(self, device: torch.device) -> bool:
        """Return whether it computes on tensors of this device at all."""
        raise NotImplementedError

    def offer(self, reading: Reading, problem: Problem) -> Offer | Unsupported:
        """The offer for a problem, or the reason why there is none."""
        try:
            return self.make_offer(reading, problem)
        except NotSupported as error:
            return Unsupported(str(error))

    def make_offer(self, reading: Reading, problem: Problem) -> Offer:
        """The offer for a problem; **raises** `NotSupported`."""
        raise NotImplementedError

    def linearize(
        self, reading: Reading, problem: Problem, parameters: Tensors
    ) -> Linearized | Unsupported:
        """The model at each task's `parameters`, `[T, ...]`, on the support sets of a problem."""
        return Unsupported("it has no passes of its own")


class NetworkExecutor(Executor):
    """An executor that computes layers in the module's stead.

    It is given problems in which all that adapts is read by some layer.
    """

    replaces_module = True

    def offer(self, reading: Reading, problem: Problem) -> Offer | Unsupported:
        """The offer for a problem, or the reason why there is none."""
        offer = super().offer(reading, problem.without_unread)
        if isinstance(offer, Unsupported):
            return offer
        run = offer.run
        return replace(offer, run=lambda given: given.completed(run(given.without_unread)))


def layers(reading: Reading) -> Network:
    """The model as layers; **raises** `NotSupported` where it is not such."""
    if reading.network is None:
        raise NotSupported(f"the model could not be read into layers: {reading.unreadable}")
    if reading.unseen:
        raise NotSupported(reading.unseen)
    if reading.writes and (reading.loss is None or reading.query_loss is None):
        raise NotSupported(f"{reading.writes}, which the loss may read")
    return reading.network


def layers_and_losses(reading: Reading) -> tuple[Network, Loss, Loss]:
    """The model as layers, and its standard losses; **raises** `NotSupported` for anything else."""
    network = layers(reading)
    if reading.loss is None or reading.query_loss is None:
        which = "loss" if reading.loss is None else "query loss"
        raise NotSupported(
            f"the {which} is none of torch's standard ones: pass one of them, or a function that "
            "does nothing but call one"
        )
    return network, reading.loss, reading.query_loss


def check_known(nodes: Sequence[Node]) -> None:
    """**Raises** `NotSupported` for a layer without rules of its own, which torch must compute."""
    for node in nodes:
        if isinstance(node.layer, Foreign):
            raise NotSupported(node.layer.reason)
