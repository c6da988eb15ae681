"""The front: layers before those of the fused step, which torch runs once, on all sets.

It is embeddings, concatenated constants, a body of another kind; nothing in it adapts. The fused
step gives the derivatives by what it gives, and autograd takes those back through it. An empty one
serves inputs that require grad.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastmeta.executors.base import NotSupported
from fastmeta.executors.fused.beside import Divided, divide
from fastmeta.executors.fused.lowering import dense_layers
from fastmeta.executors.problem import FormUnavailable, Outcome, Problem
from fastmeta.network.graph import BatchNorm, Dropout, Foreign, Network, Node
from fastmeta.network.layers.operations import ModuleCall
from fastmeta.tasks import TaskBatch, per_step_batch

FLOPS = 2e10
"""FLOP of torch's operators in a second, roughly."""
OPERATOR = 2e-5
"""Seconds that torch takes for an operator, forward and back."""


@dataclass(frozen=True, eq=False)
class Front:
    """The first nodes of a network, whose last value alone the others read."""

    nodes: tuple[Node, ...]
    divided: Divided | None = None
    """The layers behind it, where parameters stand beside the inputs of some."""

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The parameters that it reads."""
        return frozenset(name for node in self.nodes for name in node.layer.parameters())

    @functools.cached_property
    def buffers(self) -> frozenset[str]:
        """The buffers that its layers may read."""
        read: set[str] = set()
        for layer in (node.layer for node in self.nodes):
            if isinstance(layer, Foreign):
                read.update(layer.buffers)
            elif isinstance(layer, BatchNorm):
                read.update(name for name in (layer.mean, layer.variance) if name)
        return frozenset(read)

    def flows(self, problem: Problem) -> bool:
        """Return whether the derivatives by its values are asked for."""
        if not problem.differentiate:
            return False
        learns = not self.names.isdisjoint(problem.model.parameters())
        return learns or any(e.inputs.requires_grad for e in problem.tasks.given())

    def width(self, example: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an example behind it."""
        return self.nodes[-1].shape if self.nodes else example

    def seconds(self, problem: Problem) -> float:
        """An estimate of its passes over all sets."""
        sets = problem.tasks.given()
        examples = sum(each.tasks * each.count for each in sets)
        calls = 2 * sum(1 if self._is_by_example else each.tasks for each in sets)
        flops = 3 * sum(node.flops for node in self.nodes) * examples
        return flops / FLOPS + OPERATOR * len(self.nodes) * calls

    def behind(self, problem: Problem, values: Sequence[Tensor]) -> Problem:
        """The problem of the layers behind it, from its value on each set."""
        sets = [
            replace(examples, inputs=value.detach())
            for examples, value in zip(problem.tasks.given(), values, strict=True)
        ]
        query = sets[1] if len(sets) > 1 else None
        per_step = problem.tasks.per_step is not None
        tasks = per_step_batch(sets[0], query) if per_step else TaskBatch(sets[0], query)
        model = problem.model
        written = tuple(name for name in model.written if not self._has(name))
        if len(written) < len(model.written):  # what the front's passes write is thrown away
            model = model.writing(written)
        behind = replace(problem, tasks=tasks, model=model)
        return behind if self.divided is None else self.divided.problem(behind)

    def _has(self, buffer: str) -> bool:
        return any(buffer.startswith(f"{node.name}.") for node in self.nodes)

    def shaped(self, problem: Problem) -> Problem:
        """The same problem, from values that nobody has computed."""
        values: list[Tensor] = []
        for examples in problem.tasks.given():
            leading = 3 if examples is problem.tasks.per_step else 2
            shape = tuple(examples.inputs.shape)
            example = self.width(shape[leading:])
            values.append(problem.task_weights.new_empty(*shape[:leading], *example))
        return self.behind(problem, values)

    def values(self, problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Its value on each set, on autograd's tape."""
        tensors = dict(problem.model.all_parameters())
        tensors.update((name, problem.model.module.get_buffer(name)) for name in self.buffers)
        network = Network(self.nodes, len(self.nodes) - 1)
        found: list[Tensor] = []
        for examples, x in zip(problem.tasks.given(), inputs, strict=True):
            leading = 2 if examples is problem.tasks.per_step else 1
            sets = x.flatten(0, leading - 1)
            if self._is_by_example:
                y = network.forward(tensors, sets.flatten(0, 1)).unflatten(0, sets.shape[:2])
            else:
                y = torch.stack([network.forward(tensors, each) for each in sets.unbind(0)])
            if y.dtype != problem.task_weights.dtype or y.shape[2:] != self.nodes[-1].shape:
                raise FormUnavailable("what stands in front of the layers gives something else")
            found.append(y.unflatten(0, x.shape[:leading]).contiguous())
        return found

    @functools.cached_property
    def _is_by_example(self) -> bool:
        """Return whether an example's value is sure to depend on that example alone."""
        return not any(node.layer.mixes_examples and not _embeds(node) for node in self.nodes)


def _embeds(node: Node) -> bool:
    operations = node.layer.operations if isinstance(node.layer, Foreign) else ()
    called = [each.target for each in operations]
    return len(called) > 0 and all(
        isinstance(each, ModuleCall) and type(each.module) is nn.Embedding for each in called
    )


def split(network: Network, problem: Problem) -> tuple[Front | None, Network]:
    """The front, where one is needed, and the layers behind it; **raises** `NotSupported`."""
    sets = problem.tasks.given()
    if not all(isinstance(examples.inputs, Tensor) for examples in sets):
        return None, network
    flows = problem.differentiate and any(examples.inputs.requires_grad for examples in sets)
    try:
        dense_layers(network.nodes, network.output)
    except NotSupported:
        pass
    else:
        return (Front(()) if flows else None), network
    divided = divide(network, problem)
    if divided is not None:
        try:
            dense_layers(divided.network.nodes, divided.network.output)
        except NotSupported:
            pass
        else:
            return Front((), divided), divided.network
    for cut in range(1, len(network.nodes)):
        if _may_begin_at(network, cut, problem.inner.adapted):
            behind = _behind(network, cut)
            try:
                dense_layers(behind.nodes, behind.output)
            except NotSupported:
                continue
            return Front(network.nodes[:cut]), behind
    return None, network  # whose layers say why


def _may_begin_at(network: Network, cut: int, adapted: Collection[str]) -> bool:
    """Return whether the nodes before it can be a front."""
    front, behind = network.nodes[:cut], network.nodes[cut:]
    read = {i for node in behind for i in node.inputs if i < cut}
    names = Network(front, cut - 1).parameters()
    whole = {name for node in front for name in node.layer.parameters()}
    return (
        read == {cut - 1}
        and len(front[-1].shape) == 1
        and names == whole  # nothing in it that nobody reads
        and whole.isdisjoint(adapted)
        and whole.isdisjoint(name for node in behind for name in node.layer.parameters())
        and not any(isinstance(node.layer, Dropout) for node in front)
    )


def _behind(network: Network, cut: int) -> Network:
    nodes = tuple(
        replace(node, inputs=tuple(i - cut for i in node.inputs)) for node in network.nodes[cut:]
    )
    return Network(nodes, network.output - cut)


@dataclass(frozen=True, eq=False)
class Passed:
    """A front's pass over the sets of a step: what goes in, and what comes out of it."""

    front: Front
    problem: Problem
    inputs: list[Tensor]
    values: list[Tensor]

    @classmethod
    def over(cls, front: Front, problem: Problem) -> Passed:
        """The pass, on autograd's tape where the meta-gradient is asked for."""
        inputs = [examples.inputs for examples in problem.tasks.given()]
        if not problem.differentiate:
            with torch.no_grad():
                return cls(front, problem, inputs, cls._values(front, problem, inputs))
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in inputs]
        with torch.enable_grad():
            return cls(front, problem, inputs, cls._values(front, problem, inputs))

    @staticmethod
    def _values(front: Front, problem: Problem, inputs: list[Tensor]) -> list[Tensor]:
        return front.values(problem, inputs) if front.nodes else inputs

    def behind(self) -> Problem:
        """The problem of the layers behind the front."""
        return self.front.behind(self.problem, self.values)

    def complete(self, outcome: Outcome, by_values: Sequence[Tensor]) -> Outcome:
        """The outcome with the gradients of what the front reads, from those by its values."""
        named = self.problem.model.parameters()
        trainable = [name for name in self.front.names if name in named]
        given = [examples.inputs for examples in self.problem.tasks.given()]
        moving = [i for i, x in enumerate(self.inputs) if x.requires_grad]
        leaves = [*(named[name] for name in trainable), *(self.inputs[i] for i in moving)]
        pairs = zip(self.values, by_values, strict=True)
        used = [(value, by_value) for value, by_value in pairs if value.requires_grad]
        if not leaves or not used:
            return outcome
        roots, cotangents = zip(*used, strict=True)
        found = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)
        owners = [*(named[name] for name in trainable), *(given[i] for i in moving)]
        outcome.gradients += zip(owners, found, strict=True)
        return outcome


def by_values(problem: Problem) -> list[Tensor]:
    """Room for the derivatives by the inputs of each set; a support set of first order has none."""
    like = torch.contiguous_format
    return [torch.zeros_like(e.inputs, memory_format=like) for e in problem.tasks.given()]
