"""A model and its losses, read once for data of one kind: what every executor's offer rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastmeta.network.graph import Network
from fastmeta.network.losses.standard import Loss
from fastmeta.network.losses.traced import TracedLoss
from fastmeta.network.profile import Profile

Losses = tuple[Loss | None, Loss | None]
"""Those of the support and the query sets."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What is known of a model and its losses; plain data, so it pickles."""

    profile: Profile
    network: Network | None
    """The layers, where its forward could be read into such."""
    loss: Loss | None
    """The support sets' loss, where it is a standard one."""
    query_loss: Loss | None
    """The query sets' loss, where it is a standard one."""
    constants: Mapping[str, float]
    """The options of activations that the network has, by `module.option`."""
    traced: tuple[TracedLoss | None, TracedLoss | None] = (None, None)
    """The losses as expressions, where they are no standard ones and can be traced."""
    untraceable: str = ""
    """The reason why one can't."""
    example: tuple[int, ...] = ()
    """The shape of one example's input, where it is a tensor."""
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes of the parameters."""
    unread: frozenset[str] = frozenset()
    """Parameters that no layer reads, where the layers are known."""
    unreadable: str = ""
    """The reason why the model has no network here."""
    unseen: str = ""
    """What the model's Python reads and nothing can watch, so that the module itself must run."""
    writes: str = ""
    """What the model's Python writes beside its result; empty where nothing."""

    def is_at(self, losses: Losses, constants: Mapping[str, float]) -> bool:
        """Return whether it has these options of its losses and its activations."""
        pairs = zip((self.loss, self.query_loss), losses, strict=True)
        return all(map(_same, pairs)) and self.constants == constants

    def at(self, losses: Losses, constants: Mapping[str, float]) -> Reading:
        """The same with other options of its losses and its activations."""
        network = self.network and self.network.at(constants)
        loss, query_loss = losses
        return replace(
            self, network=network, loss=loss, query_loss=query_loss, constants=dict(constants)
        )

    @property
    def may_capture(self) -> bool:
        """Whether loss or model may reach tensors that are neither arguments nor parameters."""
        return self.network is None or self.loss is None or self.query_loss is None

    @property
    def maskable(self) -> bool:
        """Whether ragged tasks may be padded: every example counts by itself."""
        return (
            self.loss is not None
            and self.query_loss is not None
            and self.network is not None
            and self.network.examples_independent()
        )


def _same(pair: Losses) -> bool:
    """Return whether two losses of one structure have the same options."""
    loss, other = pair
    return loss is other or loss is None or other is None or loss.equals(other)
