"""The plan of a meta-step: what the model is made of, and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from fastmeta.executors import fused, layered
from fastmeta.executors.kernel_loss import Declined
from fastmeta.plan.layers import Network
from fastmeta.plan.losses import Loss
from fastmeta.plan.profile import Profile

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Plan:
    """Made once for a model, a loss and the shapes of the data; plain data, so it pickles.

    `unavailable` says of each form of the general path why it can't serve, where one can't.
    """

    profile: Profile
    network: Network | None
    loss: Loss | None
    constants: Mapping[str, float]
    """The options of activations that the network has, by `module.option`."""
    example: tuple[int, ...] = ()
    """The shape of one example's input, where it is a tensor."""
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of the parameters."""
    unread: frozenset[str] = frozenset()
    """Parameters that no layer reads, where the layers are known."""
    unreadable: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)

    @cached_property
    def recipe(self) -> fused.Recipe | str:
        """The network for the fused kernels, or why they can't serve it."""
        return _or_why(lambda: fused.recipe(self.network, self.loss, self.unreadable))

    @cached_property
    def layers(self) -> layered.Recipe | str:
        """The network for the layered executor, or why it can't serve it."""
        return _or_why(
            lambda: layered.recipe(
                self.network, self.loss, self.example, self.sizes, self.unreadable
            )
        )

    def is_at(self, loss: Loss | None, constants: Mapping[str, float]) -> bool:
        """Return whether it has these options of its loss and its activations."""
        same = self.loss is loss or self.loss is None or loss is None or self.loss.equals(loss)
        return same and self.constants == constants

    def at(self, loss: Loss | None, constants: Mapping[str, float]) -> Plan:
        """The same plan with other options of its loss and its activations."""
        network = self.network and self.network.at(constants)
        return replace(self, network=network, loss=loss, constants=dict(constants))

    @property
    def may_capture(self) -> bool:
        """Whether loss or model may reach tensors that are neither arguments nor parameters."""
        return self.network is None or self.loss is None

    @property
    def maskable(self) -> bool:
        """Whether ragged tasks may be padded: every example counts by itself."""
        return (
            self.loss is not None
            and self.network is not None
            and self.network.examples_independent()
        )

    def without(self, form: str, reason: str) -> Plan:
        """The plan once a form has turned out not to serve."""
        return replace(self, unavailable={**self.unavailable, form: reason})


def objective(
    loss_fn: Callable[[Any, Any], Tensor], loss: Loss | None
) -> Callable[[Any, Any, Tensor | None], Tensor]:
    """`(prediction, targets, weights) -> mean loss` for an executor."""

    def mean_loss(prediction: Any, targets: Any, weights: Tensor | None) -> Tensor:
        if weights is None:
            return loss_fn(prediction, targets)
        assert loss is not None, "only recognised losses are padded"
        return loss.weighted(prediction, targets, weights)

    return mean_loss


def _or_why(make: Callable[[], R]) -> R | str:
    """The result, or why it declines."""
    try:
        return make()
    except Declined as reason:
        return str(reason)
