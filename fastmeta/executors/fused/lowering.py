"""A network and a loss in the terms of the fused kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastmeta.executors import base
from fastmeta.executors.base import NotSupported, check_known
from fastmeta.executors.fused.own_loss import OwnLoss, own_loss
from fastmeta.executors.kernel_loss import KernelLoss, kernel_loss
from fastmeta.executors.problem import Problem
from fastmeta.network.expressions.expression import Expression
from fastmeta.network.graph import Network, Node
from fastmeta.network.layers import (
    Activation,
    Add,
    BatchNorm,
    Dropout,
    Elementwise,
    Flatten,
    LayerNorm,
    Linear,
    Reshape,
    RMSNorm,
    Scale,
    Shift,
)
from fastmeta.network.reading import Reading

# In the order of csrc/network.h.
_ACTIVATIONS = (
    "identity", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "silu", "gelu",
    "gelu_tanh", "expression",
)  # fmt: skip


Norm = BatchNorm | LayerNorm | RMSNorm | Scale | Shift
"""Layers that may follow a product: statistics and a number a column, or that alone."""

DATA, NONE = -1, -2
"""In place of a layer that is read: the network's input; nothing."""


@dataclass(frozen=True)
class Dense:
    """A linear layer with what follows it: maybe a sum, a norm, an activation.

    Without a weight it is what follows, as wide as its input.
    """

    weight: str | None
    bias: str | None
    inputs: int
    outputs: int
    norm: Norm | None = None
    activation: int | None = None
    options: tuple[float, float] = (0.0, 0.0)
    expression: Expression | None = None
    """The activation, where it is none that the kernels know by name."""
    source: int = DATA
    """The layer whose output it reads."""
    plus: int = NONE
    """The layer whose output is added to its product."""
    dropout: Dropout | None = None
    """The dropout of its input, where it has no weight."""

    def tensors(self) -> tuple[str | None, ...]:
        """The names of weight, bias, scale and shift, as the kernels order them."""
        norm = self.norm
        return (self.weight, self.bias, norm and norm.weight, norm and norm.bias)

    def is_product(self) -> bool:
        """Return whether it is a product and nothing behind it."""
        behind = self.plus != NONE or self.norm is not None or self.activation is not None
        return self.weight is not None and not behind

    def reads(self) -> tuple[int, ...]:
        """The layers whose outputs it reads."""
        return (self.source,) if self.plus == NONE else (self.source, self.plus)

    @property
    def batch_norm(self) -> BatchNorm | None:
        """Its norm, where that has statistics of a set."""
        return self.norm if isinstance(self.norm, BatchNorm) else None


@dataclass(frozen=True)
class Lowered:
    """A network and a loss as the kernels take them."""

    layers: tuple[Dense, ...]
    loss: KernelLoss
    query_loss: KernelLoss
    output_shape: tuple[int, ...]
    """The shape of an example's prediction: `(C,)`, or empty for a number."""

    def names(self) -> tuple[str | None, ...]:
        """Of the layers' tensors, in order."""
        return tuple(name for layer in self.layers for name in layer.tensors())

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """The batch norm of each layer."""
        return tuple(layer.batch_norm for layer in self.layers)


def lower(reading: Reading, problem: Problem, network: Network | None = None) -> Lowered:
    """The network, or another in its place, in the kernels' terms; **raises** `NotSupported`."""
    network = network or base.layers(reading)
    needed = network.needed()
    if any(isinstance(n.layer, Dropout) for i, n in enumerate(network.nodes) if i not in needed):
        raise NotSupported("it draws random numbers that nothing reads")
    dense = dense_layers(network.nodes, network.output)
    losses: list[KernelLoss] = []
    for i, loss in enumerate((reading.loss, reading.query_loss)):
        traced = reading.traced[i]
        if loss is not None:
            losses.append(kernel_loss(loss))
        elif traced is None:
            which = ("loss", "query loss")[i]
            raise NotSupported(f"the {which} is none of torch's own, and {reading.untraceable}")
        else:
            width, captured = dense[-1].outputs, problem.captured[i]
            losses.append(own_loss(traced, captured, width, problem.differentiate, i == 1))
    shape = network.nodes[network.output].shape
    return Lowered(dense, losses[0], losses[1], shape)


def check_chain(lowered: Lowered) -> None:
    """**Raises** `NotSupported` for what the kernels of a GPU do not compute yet."""
    for i, layer in enumerate(lowered.layers):
        if layer.source != i - 1 or layer.plus != NONE or layer.weight is None:
            raise NotSupported("the CUDA kernels take chains of linear layers alone")
        if layer.norm is not layer.batch_norm:
            raise NotSupported(
                f"the CUDA kernels know no norm but batch norm (behind {layer.weight})"
            )
        if layer.expression is not None:
            raise NotSupported(f"the CUDA kernels know no activation by formula ({layer.weight})")
    if any(isinstance(loss, OwnLoss) for loss in (lowered.loss, lowered.query_loss)):
        raise NotSupported("the CUDA kernels know no loss by formula")


def dense_layers(nodes: Sequence[Node], output: int) -> tuple[Dense, ...]:
    """A network's layers in the kernels' terms; **raises** `NotSupported`."""
    check_known([nodes[i] for i in Network(tuple(nodes), output).needed()])
    layers = _Gathering(nodes, output).layers()
    if not any(layer.weight for layer in layers):
        raise NotSupported("it has no linear layer")
    names = [name for layer in layers for name in layer.tensors() if name]
    if len(set(names)) != len(names):
        raise NotSupported("a parameter is used twice")
    return tuple(layers)


class _Gathering:
    """Layers of the kernels out of nodes: what alone reads a layer becomes a part of it."""

    def __init__(self, nodes: Sequence[Node], output: int) -> None:
        self._nodes, self._output = nodes, output
        self._values = {DATA: DATA}
        """By node, the node whose value it gives: a view gives that of what it views."""
        self._needed = Network(tuple(nodes), output).needed()
        for i, node in enumerate(nodes):
            is_row = len(node.shape) == 1 or (i == output and not node.shape)
            view = isinstance(node.layer, (Flatten, Reshape)) and is_row
            self._values[i] = self._values[node.inputs[0]] if view else i
        read = [j for i in self._needed if self._values[i] == i for j in nodes[i].inputs]
        self._readers = Counter(self._values[j] for j in (output, *read))
        self._places = {DATA: DATA}
        """By value, its layer."""
        self._made: list[Dense] = []

    def layers(self) -> list[Dense]:
        for i in self._needed:
            node = self._nodes[i]
            if self._values[i] == i:
                self._add(i, node, [self._values[j] for j in node.inputs])
        last = self._values[self._output]
        if self._places[last] != len(self._made) - 1 or self._readers[last] > 1:
            raise NotSupported("its output is not that of its last layer alone")
        return self._made

    def _add(self, i: int, node: Node, read: list[int]) -> None:
        if len(node.shape) != 1:
            raise NotSupported(f"{node.name} gives {list(node.shape)} an example, not a row")
        layer, width, source = node.layer, node.shape[0], self._places[read[0]]
        passing = Dense(None, None, width, width, source=source)
        is_norm = isinstance(layer, (BatchNorm, LayerNorm, RMSNorm, Scale, Shift))
        before = self._sole(read[0])  # which it may become a part of
        if before is None or before.activation is not None or (before.norm and is_norm):
            before = passing
        place = None if before is passing else source
        if isinstance(layer, Linear):
            # Of Linear, FLOPs are 2 * in * out.
            inputs = node.flops // (2 * width) if width else 0
            if not inputs:
                raise NotSupported(f"{node.name} has no inputs or no outputs")
            self._push(i, Dense(layer.weight, layer.bias, inputs, width, source=source))
        elif isinstance(layer, Dropout):
            self._push(i, replace(passing, dropout=layer))
        elif isinstance(layer, Add):
            self._add_sum(i, read, passing)
        elif isinstance(layer, (LayerNorm, RMSNorm)) and layer.shape != node.shape:
            raise NotSupported(f"{node.name} takes statistics over more than one example")
        elif isinstance(layer, (BatchNorm, LayerNorm, RMSNorm, Scale, Shift)):
            self._put(i, place, replace(before, norm=layer))
        elif isinstance(layer, (Activation, Elementwise)):
            self._put(i, place, _with_activation(before, layer))
        else:
            raise NotSupported(
                f"layer {node.name!r} ({type(layer).__name__}) is none of a multilayer perceptron: "
                "Linear, norms, activations, dropout, sums"
            )

    def _add_sum(self, i: int, read: list[int], passing: Dense) -> None:
        """Append a sum, or put it behind the product that comes last, if nothing else is there."""
        first, second = sorted(read, key=lambda value: self._places[value])
        place, last = self._places[second], self._sole(second)
        if last is not None and first != second and last.is_product():
            self._put(i, place, replace(last, plus=self._places[first]))
        else:
            self._push(i, replace(passing, source=self._places[first], plus=place))

    def _sole(self, value: int) -> Dense | None:
        """The layer that gives a value, where nothing else reads it."""
        if value == DATA or self._readers[value] > 1:
            return None
        return self._made[self._places[value]]

    def _push(self, value: int, layer: Dense) -> None:
        self._put(value, None, layer)

    def _put(self, value: int, place: int | None, layer: Dense) -> None:
        """Append a layer that gives a value, or put it in another's place."""
        if place is None:
            place = len(self._made)
            self._made.append(layer)
        else:
            self._made[place] = layer
        self._places[value] = place


def _with_activation(layer: Dense, activation: Activation | Elementwise) -> Dense:
    if isinstance(activation, Elementwise):
        number = _ACTIVATIONS.index("expression")
        return replace(layer, activation=number, expression=activation.expression)
    kind, options = activation.kind, dict(activation.options)
    options.pop("inplace", None)
    values = (0.0, 0.0)
    if kind == "leaky_relu":
        values = (float(options.get("negative_slope", 0.01)), 0.0)
    elif kind == "elu":
        values = (float(options.get("alpha", 1.0)), 0.0)
    elif kind == "softplus":
        values = (float(options.get("beta", 1.0)), float(options.get("threshold", 20.0)))
    elif kind == "gelu" and options.get("approximate", "none") != "none":
        kind = "gelu_tanh"
    if kind not in _ACTIVATIONS:
        raise NotSupported(f"{kind} is no activation of the kernels")
    if kind in ("leaky_relu", "elu") and values[0] < 0:
        raise NotSupported(f"{kind} has a negative slope, so its output does not tell its side")
    if kind == "softplus" and values[0] <= 0:
        raise NotSupported("softplus has a beta that is not positive")
    return replace(layer, activation=_ACTIVATIONS.index(kind), options=values)
