"""The compiled passes of an MLP in a sweep over layers: a pass of all tasks in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import packing
from fastmeta.executors.addresses import Addresses
from fastmeta.executors.fused.lowering import Dense
from fastmeta.executors.layers.lowering import INPUT
from fastmeta.executors.layers.passes import Ask, Found, Pass, Values
from fastmeta.executors.problem import Problem
from fastmeta.network.layers import Batch, Layer, Tensors


@dataclass(frozen=True, eq=False)
class DenseLayer(Layer):
    """A dense layer as one node of a network whose passes are compiled."""

    dense: Dense

    def parameters(self) -> tuple[str, ...]:
        """The names of weight, bias, scale and shift, as far as it has them."""
        return tuple(name for name in self.dense.tensors() if name)


@dataclass(frozen=True, eq=False)
class Run:
    """Layers that follow each other, compiled for the sizes and options of a problem."""

    compiled: Any
    layers: tuple[Dense, ...]
    first: int
    """The place of the first one among the network's nodes."""
    slots: int
    """How many support sets have traces of their own at a time."""
    names: tuple[str | None, ...] = field(init=False)
    """Of its tensors, as the kernels order them."""

    def __post_init__(self) -> None:
        names = tuple(name for layer in self.layers for name in layer.tensors())
        object.__setattr__(self, "names", names)

    @property
    def last(self) -> int:
        """The place of the last one."""
        return self.first + len(self.layers) - 1

    def slot(self, step: int | None) -> int:
        """The slot of an inner step, or of the query set."""
        return self.slots if step is None else min(step, self.slots - 1)


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
        self.adapted = frozenset(problem.inner.adapted)
        self.there = False
        """Whether the traces hold the parameters that do not adapt."""
        norms = [layer.norm for layer in run.layers]
        self.statistics = packing.statistics(problem, norms) if any(norms) else []
        named = problem.model.all_parameters()
        self.shapes = [None if name is None else named[name].shape for name in run.names]
        self.like = problem.task_weights


class OpenPass:
    """One pass through a run."""

    def __init__(self, traced: _Traced, step: int | None, at: Tensors, batch: Batch) -> None:
        self._traced, self._at, self._count = traced, at, batch.count
        self._slot = traced.run.slot(step)
        self._addresses = Addresses()
        self._x = 0

    def forward(self, given: Values, keep: Sequence[int]) -> Values:
        """The output, from the input that is given."""
        traced, run, addresses = self._traced, self._traced.run, self._addresses
        (self._x,) = addresses.each((given[run.first - 1],), ("x",))
        fixed = traced.there
        tensors = [
            None if name is None or (fixed and name not in traced.adapted) else self._at[name]
            for name in run.names
        ]
        output = self._rows(run.layers[-1].outputs)
        traced.compiled.forward(
            traced.traces, self._slot, self._x, addresses.each(tensors, run.names),
            _strides(tensors), addresses.each(traced.statistics, ("mean",) * len(tensors)),
            output.data_ptr(), traced.threads,
        )  # fmt: skip
        traced.there = True
        return {run.last: output}

    def backward(self, gradients: Values, ask: Ask) -> Found:
        """The gradients that are asked for, from the output's."""
        return self._reverse(gradients, ask, of_tangent=False)

    def tangent(self, along: Tensors, output: int) -> Tensor:
        """The tangent of the output along those of the parameters that adapt."""
        traced, run, addresses = self._traced, self._traced.run, Addresses()
        vectors = [None if name is None else along.get(name) for name in run.names]
        tangent = self._rows(run.layers[-1].outputs)
        traced.compiled.tangent(
            traced.traces, self._slot, self._x, addresses.each(vectors, run.names),
            _strides(vectors), tangent.data_ptr(), traced.threads,
        )  # fmt: skip
        return tangent

    def tangent_backward(self, tangents: Values, ask: Ask) -> Found:
        """The derivatives of what `backward` gave along the same tangents."""
        return self._reverse(tangents, ask, of_tangent=True)

    def _reverse(self, flowing: Values, ask: Ask, of_tangent: bool) -> Found:
        traced, run, addresses = self._traced, self._traced.run, Addresses()
        found = Found()
        summed: Tensor | None = None
        places, strides = [0] * len(run.names), [0] * len(run.names)
        start = 0
        for i, (name, shape) in enumerate(zip(run.names, traced.shapes, strict=True)):
            if name is None or shape is None:
                continue
            size = math.prod(shape)
            count = ask.parameters.get(name)
            if count is not None and count == traced.tasks:
                part = traced.like.new_empty(count, *shape)
                places[i], strides[i] = part.data_ptr(), size
                found.parameters[name] = part
            elif count is not None:
                if summed is None:
                    summed = traced.like.new_empty(traced.compiled.parameters)
                places[i] = summed.data_ptr()
                found.parameters[name] = summed[start : start + size].view(1, *shape)
            start += size
        border = run.first - 1
        of_input = 0
        if border != INPUT and border in ask.values:
            found.values[border] = self._rows(run.layers[0].inputs)
            of_input = found.values[border].data_ptr()
        traced.compiled.backward(
            traced.traces, self._slot, self._x, addresses.of(flowing[run.last], "the gradient"),
            places, strides, 0 if summed is None else summed.data_ptr(), of_input, of_tangent,
            traced.threads,
        )  # fmt: skip
        return found

    def _rows(self, width: int) -> Tensor:
        traced = self._traced
        return traced.like.new_empty(traced.tasks, self._count, width)


def _strides(tensors: Sequence[Tensor | None]) -> list[int]:
    """How far apart the tasks' tensors `[T, ...]` are; 0 where they share one."""
    return [
        0 if tensor is None or tensor.shape[0] == 1 else tensor[0].numel() for tensor in tensors
    ]
