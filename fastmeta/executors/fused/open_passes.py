"""The compiled passes of an MLP in a sweep over layers: a pass of all tasks in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.addresses import Addresses
from fastmeta.executors.fused.lowering import Dense
from fastmeta.executors.layers import joint
from fastmeta.executors.layers.joint import Joint
from fastmeta.executors.layers.lowering import INPUT
from fastmeta.executors.layers.passes import GradientRequest, Pass, PassGradients, Values
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import Batch, Layer, Tensors


@dataclass(frozen=True, eq=False)
class DenseLayer(Layer):
    """A dense layer as one node of a network whose passes are compiled."""

    names: tuple[str, ...]
    """Of weight, bias, scale and shift, as far as it has them; what is joint under that name."""

    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return self.names


@dataclass(frozen=True)
class Group:
    """Tensors of the kernels that a sweep has under one name: one, or all that adapt."""

    name: str
    shape: tuple[int, ...]
    width: int
    """How many numbers they have together."""
    members: tuple[tuple[int, int], ...]
    """Of each, its place among the kernels' tensors and the first of its numbers in the group."""
    pieces: tuple[slice, ...]
    """Their places among the numbers of all the kernels' tensors, as few as can be."""
    adapts: bool


@dataclass(frozen=True, eq=False)
class Run:
    """Layers that follow each other, compiled for the sizes and options of a problem."""

    compiled: Any
    layers: tuple[Dense, ...]
    groups: tuple[Group, ...]
    first: int
    """The place of the first one among the network's nodes."""
    slots: int
    """How many support sets have traces of their own at a time."""

    @property
    def last(self) -> int:
        """The place of the last one."""
        return self.first + len(self.layers) - 1

    def slot(self, step: int | None) -> int:
        """The slot of an inner step, or of the query set."""
        return self.slots if step is None else min(step, self.slots - 1)


def groups(layers: Sequence[Dense], problem: Problem, together: Joint | None) -> tuple[Group, ...]:
    """The tensors of layers by the names that a sweep has them under."""
    named, adapted = problem.model.all_parameters(), problem.inner.adapted
    names = [name for layer in layers for name in layer.tensors()]
    members: dict[str, list[tuple[int, int]]] = {}
    pieces: dict[str, list[slice]] = {}
    widths: dict[str, int] = {}
    start = 0
    for i, name in enumerate(names):
        if name is None:
            continue
        size = named[name].numel()
        key = joint.NAME if together is not None and name in together.names else name
        width = widths.get(key, 0)
        members.setdefault(key, []).append((i, width))
        widths[key] = width + size
        found = pieces.setdefault(key, [])
        if found and found[-1].stop == start:
            found[-1] = slice(found[-1].start, start + size)
        else:
            found.append(slice(start, start + size))
        start += size
    return tuple(
        Group(
            key, (widths[key],) if key == joint.NAME else tuple(named[key].shape), widths[key],
            tuple(members[key]), tuple(pieces[key]), key == joint.NAME or key in adapted,
        )
        for key in members
    )  # fmt: skip


class OpenPasses:
    """The passes of one sweep over so many tasks, with the storage of their traces."""

    def __init__(self, body: Run | None, head: Run, problem: Problem, tasks: int) -> None:
        self._body = None if body is None else _Traced(body, problem, tasks)
        self._head = _Traced(head, problem, tasks)

    def body(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers in front of those that adapt."""
        assert self._body is not None
        return OpenPass(self._body, step, at, batch)

    def head(self, step: int | None, at: Tensors, batch: Batch) -> Pass:
        """A pass through the layers from the first that adapts on."""
        return OpenPass(self._head, step, at, batch)


class _Traced:
    """A run, and what passes leave in it."""

    def __init__(self, run: Run, problem: Problem, tasks: int) -> None:
        self.run, self.compiled = run, run.compiled
        self.traces = run.compiled.traces(tasks)
        self.tasks = tasks
        self.threads = torch.get_num_threads()
        self.there = False
        """Whether the traces hold the parameters that do not adapt."""
        norms = [layer.batch_norm for layer in run.layers]
        self.statistics = packing.statistics(problem, norms) if any(norms) else []
        self.like = problem.task_weights
        self.none = [0] * sum(len(layer.tensors()) for layer in run.layers)

    def rows(self, count: int, width: int) -> Tensor:
        """Room for `[T, N, width]`."""
        return self.like.new_empty(self.tasks, count, width)


class OpenPass:
    """One pass through a run."""

    def __init__(self, traced: _Traced, step: int | None, at: Tensors, batch: Batch) -> None:
        self._traced, self._at, self._count = traced, at, batch.count
        self._slot = traced.run.slot(step)
        self._addresses = Addresses()
        self._x = 0

    def forward(self, given: Values, keep: Sequence[int]) -> Values:
        """The output, from the input that is given."""
        traced, run = self._traced, self._traced.run
        self._x = self._addresses.of(given[run.first - 1], "x")
        wanted = [group for group in run.groups if group.adapts or not traced.there]
        output = traced.rows(self._count, run.layers[-1].outputs)
        traced.compiled.forward(
            traced.traces, self._slot, self._x, *self._places(wanted, self._at),
            self._addresses.each(traced.statistics, ("statistics",) * len(traced.statistics)),
            output.data_ptr(), traced.threads,
        )  # fmt: skip
        traced.there = True
        return {run.last: output}

    def backward(self, gradients: Values, request: GradientRequest) -> PassGradients:
        """The gradients that are asked for, from the output's."""
        return self._reverse(gradients, request, of_tangent=False)

    def tangent(self, along: Tensors, output: int) -> Tensor:
        """The tangent of the output along those of the parameters that adapt."""
        traced, run = self._traced, self._traced.run
        vectors = [group for group in run.groups if group.name in along]
        tangent = traced.rows(self._count, run.layers[-1].outputs)
        traced.compiled.tangent(
            traced.traces, self._slot, self._x, *self._places(vectors, along),
            tangent.data_ptr(), traced.threads,
        )  # fmt: skip
        return tangent

    def tangent_backward(self, tangents: Values, request: GradientRequest) -> PassGradients:
        """The derivatives of what `backward` gave along the same tangents."""
        return self._reverse(tangents, request, of_tangent=True)

    def _reverse(
        self, flowing: Values, request: GradientRequest, of_tangent: bool
    ) -> PassGradients:
        traced, run, found = self._traced, self._traced.run, PassGradients()
        gradient = flowing[run.last]
        summed: Tensor | None = None
        shared: list[Group] = []
        places, strides = traced.none.copy(), traced.none.copy()
        for group in run.groups:
            count = request.parameters.get(group.name)
            if count is None:
                continue
            if count == traced.tasks:
                part = traced.like.new_empty((count, *group.shape))
                _place(places, strides, group, part)
                found.parameters[group.name] = part
                continue
            if summed is None:
                summed = traced.like.new_empty(traced.compiled.parameters)
            for i, _ in group.members:
                places[i] = summed.data_ptr()
            shared.append(group)
        border, of_input = run.first - 1, 0
        if border != INPUT and border in request.values:
            found.values[border] = traced.rows(self._count, run.layers[0].inputs)
            of_input = found.values[border].data_ptr()
        traced.compiled.backward(
            traced.traces, self._slot, self._x, self._addresses.of(gradient, "the gradient"),
            places, strides, 0 if summed is None else summed.data_ptr(), of_input, of_tangent,
            traced.threads,
        )  # fmt: skip
        for group in shared:
            assert summed is not None
            parts = [summed[piece] for piece in group.pieces]
            part = parts[0] if len(parts) == 1 else torch.cat(parts)
            found.parameters[group.name] = part.view(1, *group.shape)
        return found

    def _places(self, wanted: Sequence[Group], at: Tensors) -> tuple[list[int], list[int]]:
        """The addresses of the kernels' tensors `[S, ...]`, and how far apart the tasks' are."""
        places, strides = self._traced.none.copy(), self._traced.none.copy()
        tensors = [at[group.name] for group in wanted]
        addresses = self._addresses.each(tensors, [group.name for group in wanted])
        for group, tensor, address in zip(wanted, tensors, addresses, strict=True):
            stride = 0 if tensor.shape[0] == 1 else group.width
            for i, offset in group.members:
                places[i], strides[i] = address + offset * tensor.itemsize, stride
        return places, strides


def _place(places: list[int], strides: list[int], group: Group, part: Tensor) -> None:
    address = part.data_ptr()
    for i, offset in group.members:
        places[i], strides[i] = address + offset * part.itemsize, group.width
