"""A network and a loss in the terms of the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastmeta.executors import base
from fastmeta.executors.base import NotSupported, check_known
from fastmeta.executors.fused.own_loss import OwnLoss, own_loss
from fastmeta.executors.kernel_loss import KernelLoss, kernel_loss
from fastmeta.executors.problem import Problem
from fastmeta.network.expressions.expression import Expression
from fastmeta.network.graph import Node
from fastmeta.network.layers import (
    Activation,
    BatchNorm,
    Elementwise,
    Flatten,
    Linear,
    Reshape,
)
from fastmeta.network.reading import Reading

# In the order of csrc/network.h.
_ACTIVATIONS = (
    "identity", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "silu", "gelu",
    "gelu_tanh", "expression",
)  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A linear layer with what follows it: maybe a norm, maybe an activation."""

    weight: str
    bias: str | None
    inputs: int
    outputs: int
    norm: BatchNorm | None = None
    activation: int | None = None
    options: tuple[float, float] = (0.0, 0.0)
    expression: Expression | None = None
    """The activation, where it is none that the kernels know by name."""

    def tensors(self) -> tuple[str | None, ...]:
        """The names of weight, bias, scale and shift, as the kernels order them."""
        norm = self.norm
        return (self.weight, self.bias, norm and norm.weight, norm and norm.bias)


@dataclass(frozen=True)
class Lowered:
    """A network and a loss as the kernels take them."""

    layers: tuple[Dense, ...]
    loss: KernelLoss
    query_loss: KernelLoss

    def names(self) -> tuple[str | None, ...]:
        """Of the layers' tensors, in order."""
        return tuple(name for layer in self.layers for name in layer.tensors())

    def norms(self) -> tuple[BatchNorm | None, ...]:
        """The batch norm of each layer."""
        return tuple(layer.norm for layer in self.layers)


def lower(reading: Reading, problem: Problem) -> Lowered:
    """The network in the kernels' terms; **raises** `NotSupported`."""
    network = base.layers(reading)
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
    return Lowered(dense, *losses)


def check_named(lowered: Lowered) -> None:
    """**Raises** `NotSupported` for expressions, of which the kernels of a GPU have no programs."""
    for layer in lowered.layers:
        if layer.expression is not None:
            raise NotSupported(f"the CUDA kernels know no activation by formula ({layer.weight})")
    if any(isinstance(loss, OwnLoss) for loss in (lowered.loss, lowered.query_loss)):
        raise NotSupported("the CUDA kernels know no loss by formula")


def dense_layers(nodes: Sequence[Node], output: int) -> tuple[Dense, ...]:
    """A network's layers in the kernels' terms; **raises** `NotSupported`."""
    check_known(nodes)
    layers: list[Dense] = []
    for i, node in enumerate(nodes):
        if node.inputs != (i - 1,):
            raise NotSupported(f"{node.name} does not follow the layer before it")
        if len(node.shape) != 1:
            raise NotSupported(f"{node.name} gives {list(node.shape)} an example, not a row")
        width = node.shape[0]
        if isinstance(node.layer, Linear):
            # Of Linear, FLOPs are 2 * in * out.
            inputs = node.flops // (2 * width) if width else 0
            if not inputs:
                raise NotSupported(f"{node.name} has no inputs or no outputs")
            layers.append(Dense(node.layer.weight, node.layer.bias, inputs, width))
        elif isinstance(node.layer, BatchNorm):
            if not layers or layers[-1].norm or layers[-1].activation is not None:
                raise NotSupported(f"layer {node.name!r} (BatchNorm) does not follow a Linear")
            layers[-1] = replace(layers[-1], norm=node.layer)
        elif isinstance(node.layer, (Activation, Elementwise)):
            if not layers or layers[-1].activation is not None:
                raise NotSupported(f"layer {node.name!r} (activation) does not follow a Linear")
            layers[-1] = _with_activation(layers[-1], node.layer)
        elif not isinstance(node.layer, (Flatten, Reshape)):
            kind = type(node.layer).__name__
            raise NotSupported(
                f"layer {node.name!r} ({kind}) is none of a multilayer perceptron: Linear, "
                "BatchNorm1d, activations"
            )
    if not layers or output != len(nodes) - 1:
        raise NotSupported("it is no chain of linear layers")
    names = [name for layer in layers for name in layer.tensors() if name]
    if len(set(names)) != len(names):
        raise NotSupported("a parameter is used twice")
    return tuple(layers)


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
