"""A network and a loss for the layered executor, and how its layers divide by what adapts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastmeta.executors.base import NotSupported, layers
from fastmeta.network.graph import Node
from fastmeta.network.layers import Add
from fastmeta.network.losses.standard import Loss
from fastmeta.network.reading import Reading

INPUT = -1
"""The network's input as a value; a node's output goes by its index."""


@dataclass(frozen=True, eq=False)
class Lowered:
    """The nodes that the prediction depends on, and the losses of support and query sets."""

    nodes: tuple[Node, ...]
    output: int
    loss: Loss | None
    """None where torch computes it at the prediction."""
    query_loss: Loss | None

    def names(self) -> tuple[str, ...]:
        """The parameters that its layers read, each once."""
        found = [name for node in self.nodes for name in node.layer.parameters()]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True, eq=False)
class Parts:
    """The layers by whether the inner loop reaches them.

    No adapted parameter reaches the body, which is run once; the head is run at every step.
    """

    body: tuple[int, ...]
    head: tuple[int, ...]
    moving: frozenset[int]
    """The values that an adapted parameter reaches."""
    learning: frozenset[int]
    """The values that a trainable parameter reaches."""
    border: tuple[int, ...]
    """The values of the body, or the input, that the head reads."""


def lower(reading: Reading) -> Lowered:
    """The network for this executor; **raises** `NotSupported`."""
    network = layers(reading)
    if network.output == INPUT:
        raise NotSupported("the model has no layers")
    shapes = {INPUT: reading.example, **{i: node.shape for i, node in enumerate(network.nodes)}}
    if network.draws():
        raise NotSupported("the layers' rules draw no random numbers; call eval(), or give p=0")
    for node in network.nodes:
        if isinstance(node.layer, Add) and len({shapes[i] for i in node.inputs}) > 1:
            raise NotSupported(f"{node.name} adds values of different shapes")
    needed = {network.output}
    for i in range(len(network.nodes) - 1, -1, -1):
        if i in needed:
            needed.update(network.nodes[i].inputs)
    kept = sorted(needed - {INPUT})
    place = {INPUT: INPUT, **{i: k for k, i in enumerate(kept)}}
    nodes = tuple(_moved(network.nodes[i], place) for i in kept)
    if not any(node.layer.parameters() for node in nodes):
        raise NotSupported("no layer has a parameter")
    return Lowered(nodes, place[network.output], reading.loss, reading.query_loss)


def divide(lowered: Lowered, adapted: Iterable[str], trainable: Iterable[str]) -> Parts:
    """Body and head."""
    moving, learning = _reached(lowered, adapted), _reached(lowered, trainable)
    head = tuple(i for i in range(len(lowered.nodes)) if i in moving)
    body = tuple(i for i in range(len(lowered.nodes)) if i not in moving)
    read = {source for i in head for source in lowered.nodes[i].inputs}
    return Parts(body, head, moving, learning, tuple(sorted(read - moving)))


def _moved(node: Node, place: dict[int, int]) -> Node:
    return replace(node, inputs=tuple(place[i] for i in node.inputs))


def _reached(lowered: Lowered, names: Iterable[str]) -> frozenset[int]:
    wanted, reached = set(names), set[int]()
    for i, node in enumerate(lowered.nodes):
        if wanted.intersection(node.layer.parameters()) or reached.intersection(node.inputs):
            reached.add(i)
    return frozenset(reached)
