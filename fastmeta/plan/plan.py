"""The plan of a meta-step: what the model is made of, and who computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fastmeta.executors import fused, layered
from fastmeta.plan.layers import Network
from fastmeta.plan.losses import Loss
from fastmeta.plan.profile import Profile


@dataclass(frozen=True, eq=False)
class Plan:
    """Made once for a model, a loss and the shapes of the data; plain data, so it pickles.

    `unavailable` says of each form of the general path why it can't serve, where one can't.
    """

    profile: Profile
    network: Network | None
    loss: Loss | None
    unreadable: str = ""
    recipe: fused.Recipe | str = ""
    """The network for the fused kernels, or why they can't serve it."""
    layers: layered.Recipe | str = ""
    """The network for the layered executor, or why it can't serve it."""
    unavailable: dict[str, str] = field(default_factory=dict)

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
