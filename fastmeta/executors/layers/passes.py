"""One pass of all tasks through a run of layers: forward, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor

from fastmeta.network.graph import Node
from fastmeta.network.layers import Batch, State, Tensors, Wanted

_Key = TypeVar("_Key", int, str)

Values = dict[int, Tensor]
"""Of a network, by the index of the node that gives them: `[T, N, ...]`."""


@dataclass(frozen=True)
class GradientRequest:
    """What a backward pass is to give: gradients of values, and of parameters by name."""

    values: frozenset[int]
    """Those that gradients flow to, inside the pass and at its border."""
    parameters: Mapping[str, int]
    """T for a gradient of each task's own, 1 for their sum over tasks."""


@dataclass(eq=False)
class PassGradients:
    """What a backward pass gave: at the border of the pass, and of parameters."""

    values: Values = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Pass(Protocol):
    """A run of layers at one set of parameters, on one set of every task."""

    def forward(self, given: Values, keep: Sequence[int]) -> Values:
        """Of the values, those to `keep`, from those `given` at the border."""
        ...

    def backward(self, gradients: Values, request: GradientRequest) -> PassGradients:
        """The gradients that are asked for, from those of some of its values."""
        ...

    def tangent(self, along: Tensors, output: int) -> Tensor:
        """The tangent of the output along the parameters' tangents `along`."""
        ...

    def tangent_backward(self, tangents: Values, request: GradientRequest) -> PassGradients:
        """The derivatives of what `backward` gave along the same tangents."""
        ...


class Passes(Protocol):
    """What makes the passes of one sweep.

    `step` is the inner step whose support set is passed, None for the query set. A pass ends the
    one before of the same step, or of the query set.
    """

    def body(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers in front of those that adapt."""
        ...

    def head(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers from the first that adapts on."""
        ...


@dataclass(frozen=True, eq=False)
class LayerPasses:
    """Passes by the layers' own rules, kept as long as anyone holds them."""

    nodes: Sequence[Node]
    in_body: Sequence[int]
    in_head: Sequence[int]

    def body(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers in front of those that adapt."""
        return LayerPass(self.nodes, self.in_body, at, batch)

    def head(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers from the first that adapts on."""
        return LayerPass(self.nodes, self.in_head, at, batch)


class LayerPass:
    """The layers `indices` of a network at one set of parameters, on one set of every task."""

    def __init__(
        self, nodes: Sequence[Node], indices: Sequence[int], at: Tensors, batch: Batch
    ) -> None:
        self._nodes = nodes
        self._indices = indices
        self._states = {i: State(at, batch) for i in indices}

    def forward(self, given: Values, keep: Sequence[int]) -> Values:
        """Of the values, those to `keep`, from those `given` at the border."""
        last = {source: i for i in self._indices for source in self._nodes[i].inputs}
        values = dict(given)
        for i in self._indices:
            node = self._nodes[i]
            inputs = [values[source] for source in node.inputs]
            values[i] = node.layer.forward(self._states[i], *inputs)
            for source in set(node.inputs):
                if last[source] == i and source not in keep:
                    del values[source]
        return {i: values[i] for i in keep if i in values}

    def backward(self, gradients: Values, request: GradientRequest) -> PassGradients:
        """The gradients that are asked for, from those of some of its values."""
        return self._reverse(gradients, request, "backward")

    def tangent(self, along: Tensors, output: int) -> Tensor:
        """The tangent of the output along the parameters' tangents `along`."""
        values: dict[int, Tensor | None] = {}
        for i in self._indices:
            node, state = self._nodes[i], self._states[i]
            state.tangents = along
            inputs = [values.get(source) for source in node.inputs]
            values[i] = node.layer.tangent(state, *inputs)
        found = values[output]
        assert found is not None
        return found

    def tangent_backward(self, tangents: Values, request: GradientRequest) -> PassGradients:
        """The derivatives of what `backward` gave along the same tangents."""
        return self._reverse(tangents, request, "tangent_backward")

    def _reverse(self, flowing: Values, request: GradientRequest, rule: str) -> PassGradients:
        found = PassGradients(values=dict(flowing))
        for i in reversed(self._indices):
            gradient = found.values.pop(i, None)
            if gradient is None:
                continue
            node = self._nodes[i]
            wanted = Wanted(
                tuple(source in request.values for source in node.inputs),
                {
                    n: request.parameters[n]
                    for n in node.layer.parameters()
                    if n in request.parameters
                },
            )
            inputs, parameters = getattr(node.layer, rule)(self._states[i], wanted, gradient)
            for source, part in zip(node.inputs, inputs, strict=True):
                if part is not None:
                    _add(found.values, source, part)
            for name, part in parameters.items():
                _add(found.parameters, name, part)
        return found


def _add(totals: dict[_Key, Tensor], key: _Key, part: Tensor) -> None:
    """Sums where several layers read one value, or share one parameter."""
    totals[key] = totals[key] + part if key in totals else part
