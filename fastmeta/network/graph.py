"""A network as layers in order: what a module's `forward` is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastmeta.network.layers import (
    Activation,
    Add,
    BatchNorm,
    Conv2d,
    Dropout,
    Elementwise,
    Flatten,
    Foreign,
    GroupNorm,
    Identity,
    Layer,
    LayerNorm,
    Linear,
    Mean,
    Pool2d,
    Reshape,
    RMSNorm,
    Scale,
    Shift,
    Tensors,
)

__all__ = [
    "Activation", "Add", "BatchNorm", "Conv2d", "Dropout", "Elementwise", "Flatten", "Foreign",
    "GroupNorm", "Identity", "Layer", "LayerNorm", "Linear", "Mean", "Network", "Node", "Pool2d",
    "RMSNorm", "Reshape", "Scale", "Shift",
]  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A layer in its place: the values it reads, -1 being the network's input."""

    layer: Layer
    inputs: tuple[int, ...]
    name: str = ""
    shape: tuple[int, ...] = ()
    """The output of one example."""
    flops: int = 0
    """Of one example, forward."""
    bytes: int = 0
    """Of one example's output; none where it is a view."""


@dataclass(frozen=True)
class Network:
    """A module's `forward` as layers in order; the last node's value is the prediction."""

    nodes: tuple[Node, ...]
    output: int

    def forward(self, tensors: Tensors, x: Tensor) -> Tensor:
        """The reference: what the layers compute, by torch."""
        values: dict[int, Tensor] = {-1: x}
        for i, node in enumerate(self.nodes):
            values[i] = node.layer.reference(tensors, *[values[j] for j in node.inputs])
        return values[self.output]

    def measured(self, tensors: Tensors, x: Tensor) -> Network:
        """The same network with shapes and FLOPs of each layer filled in from a pass over `x`."""
        values: dict[int, Tensor] = {-1: x}
        nodes: list[Node] = []
        for i, node in enumerate(self.nodes):
            arguments = [values[j] for j in node.inputs]
            layer = node.layer
            if isinstance(layer, Mean):
                layer = Mean(tuple(d % arguments[0].dim() for d in layer.dims), layer.keepdim)
                if 0 in layer.dims:
                    raise ValueError("a mean over examples")
            if isinstance(layer, Foreign):
                layer = layer.measured(tensors, *arguments)
            out = layer.reference(tensors, *arguments)
            if isinstance(layer, Foreign) and out.shape[:1] != x.shape[:1]:
                raise ValueError(f"{node.name} does not keep the examples in front")
            values[i] = out
            count = max(1, x.shape[0])
            is_view = out.data_ptr() == arguments[0].data_ptr()
            nodes.append(
                Node(
                    layer, node.inputs, node.name, tuple(out.shape[1:]),
                    layer.flops(tensors, out) // count, 0 if is_view else out.nbytes // count,
                )
            )  # fmt: skip
        return Network(tuple(nodes), self.output)

    def parameters(self) -> set[str]:
        """The names of the parameters that the output depends on."""
        return {name for i in self.needed() for name in self.nodes[i].layer.parameters()}

    def needed(self) -> list[int]:
        """The nodes that the output depends on, in order."""
        needed = {self.output}
        for i in range(len(self.nodes) - 1, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].inputs)
        return sorted(needed - {-1})

    def at(self, constants: Mapping[str, float]) -> Network:
        """The same network with other options of its activations, by `module.option`."""
        if not constants:
            return self
        return Network(tuple(_at(node, constants) for node in self.nodes), self.output)

    def draws(self) -> bool:
        """Return whether a pass draws random numbers."""
        return any(isinstance(node.layer, Dropout) for node in self.nodes)

    def examples_independent(self) -> bool:
        """Whether each example's output depends on that example alone."""
        return not any(node.layer.mixes_examples for node in self.nodes)


def _at(node: Node, constants: Mapping[str, float]) -> Node:
    if not isinstance(node.layer, Activation):
        return node
    options = tuple(
        (name, constants.get(f"{node.name}.{name}", value)) for name, value in node.layer.options
    )
    return replace(node, layer=Activation(node.layer.kind, options))
