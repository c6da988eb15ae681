"""Parameters put beside a layer's inputs, as CAVIA's context is: a linear layer over `cat([x, c])`.

With `W = [W_x, W_c]` it is `W [x, c] + b = (W_x x + b) + W_c c`, a residual sum of linear layers.
c in every row is the output of a linear layer of zero weights, whose bias it is. The pieces of W
are parameters of their own that do not adapt, so W must not; their gradients together are W's.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmeta.executors.problem import Outcome, Problem
from fastmeta.network.graph import Add, Foreign, Linear, Network, Node
from fastmeta.network.layers.operations import Method

_SHAPING = (
    torch.cat, torch.concat, torch.concatenate, torch.hstack, torch.column_stack, getattr,
    operator.getitem,
)  # fmt: skip
_SHAPING_METHODS = (
    "expand", "expand_as", "repeat", "unsqueeze", "squeeze", "view", "reshape", "flatten", "size",
    "dim", "contiguous",
)  # fmt: skip
"""Functions and methods that move numbers, and compute none."""

Columns = tuple[tuple[str | None, int], ...]
"""Blocks of columns, each a parameter's, or None for those of the input, and how many."""


@dataclass(frozen=True)
class Piece:
    """Some columns of a weight; of no weight, so many rows and columns of zeros."""

    name: str
    weight: str | None
    rows: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Divided:
    """A network whose concatenations are sums, and the pieces of weights that it reads."""

    network: Network
    pieces: tuple[Piece, ...]

    def tensors(self, problem: Problem) -> dict[str, Tensor]:
        """The pieces, as they are now; leaves of their own."""
        named, like = problem.model.all_parameters(), problem.task_weights
        found: dict[str, Tensor] = {}
        for piece in self.pieces:
            if piece.weight is None:
                found[piece.name] = like.new_zeros(piece.rows, piece.last - piece.first)
            else:
                weight = named[piece.weight]
                columns = weight.detach()[:, piece.first : piece.last].contiguous()
                found[piece.name] = columns.requires_grad_(weight.requires_grad)
        return found

    def problem(self, problem: Problem) -> Problem:
        """The problem of the divided network."""
        return replace(problem, model=problem.model.with_parameters(self.tensors(problem)))

    def complete(self, problem: Problem, divided: Problem, outcome: Outcome) -> Outcome:
        """The outcome with the gradients of the pieces joined to those of the weights."""
        own, pieces = problem.model.parameters(), divided.model.parameters()
        given = {id(leaf): gradient for leaf, gradient in outcome.gradients}
        joined: dict[int, Tensor] = {}
        for piece in self.pieces:
            gradient = given.get(id(pieces.get(piece.name)))
            if piece.weight is not None and gradient is not None:
                weight = own[piece.weight]
                whole = joined.setdefault(id(weight), torch.zeros_like(weight))
                whole[:, piece.first : piece.last] = gradient
        made = {id(pieces[piece.name]) for piece in self.pieces if piece.name in pieces}
        outcome.gradients = [
            (leaf, joined.get(id(leaf), gradient))
            for leaf, gradient in outcome.gradients
            if id(leaf) not in made
        ]
        return outcome


def divide(network: Network, problem: Problem) -> Divided | None:
    """The network with sums in the place of concatenations; None where it has none to divide."""
    found: dict[int, Columns] = {}
    for i, node in enumerate(network.nodes):
        if isinstance(node.layer, Foreign) and len(node.inputs) == 1 and len(node.shape) == 1:
            columns = _columns(node.layer, node.shape[0], problem)
            read = i != network.output and _read_by_fixed(i, network, problem)
            if columns is not None and read:
                found[i] = columns
    return _Dividing(network, found).made() if found else None


def _read_by_fixed(place: int, network: Network, problem: Problem) -> bool:
    """Return whether linear layers alone read a value, with weights of their own that are fixed."""
    named, adapted = problem.model.all_parameters(), set(problem.inner.adapted)
    reads = Counter(name for node in network.nodes for name in node.layer.parameters())
    layers = [node.layer for node in network.nodes if place in node.inputs]
    return all(
        isinstance(layer, Linear)
        and layer.weight in named
        and layer.weight not in adapted
        and reads[layer.weight] == 1
        for layer in layers
    )


def _columns(layer: Foreign, width: int, problem: Problem) -> Columns | None:
    """The blocks of a concatenation of the input and parameters, in order; None of anything else.

    Operations that only move numbers return columns of what they read; numbers that are all
    different tell of which.
    """
    if layer.buffers or not layer.names or not all(map(_shapes, layer.operations)):
        return None
    named = problem.model.all_parameters()
    sizes = {name: named[name].numel() for name in layer.names}
    inputs, rows = width - sum(sizes.values()), 3
    if inputs < 1:
        return None
    numbers = torch.arange(rows * inputs + sum(sizes.values()), dtype=torch.float64)
    x, *parts = numbers.split([rows * inputs, *sizes.values()])
    given = dict(zip(sizes, parts, strict=True))
    x = x.view(rows, inputs)
    tensors = {name: part.view(named[name].shape) for name, part in given.items()}
    try:
        y = layer.reference(tensors, x)
    except (RuntimeError, TypeError, IndexError):
        return None
    blocks: dict[str | None, Tensor] = {
        None: x, **{name: part.expand(rows, -1) for name, part in given.items()},
    }  # fmt: skip
    found: list[tuple[str | None, int]] = []
    if y.shape != (rows, width):
        return None
    while (first := sum(count for _, count in found)) < width:
        for name, block in blocks.items():
            if torch.equal(y[:, first : first + block.shape[1]], block):
                found.append((name, block.shape[1]))
                break
        else:
            return None
    return tuple(found) if len(found) == len(blocks) else None


def _shapes(operation: object) -> bool:
    target = getattr(operation, "target", None)
    return target.name in _SHAPING_METHODS if isinstance(target, Method) else target in _SHAPING


class _Dividing:
    """One pass over the nodes."""

    def __init__(self, network: Network, columns: Mapping[int, Columns]) -> None:
        self._network, self._columns = network, columns
        self._nodes: list[Node] = []
        self._places = {-1: -1}
        """By node, its place among the new ones."""
        self._rows: dict[str, int] = {}
        """By parameter, the layer that has it in every row."""
        self._pieces: list[Piece] = []

    def made(self) -> Divided:
        for i, node in enumerate(self._network.nodes):
            if i in self._columns:
                continue
            read = [each for each in node.inputs if each in self._columns]
            if read:
                self._places[i] = self._sum(node, read[0])
            else:
                inputs = tuple(self._places[each] for each in node.inputs)
                self._places[i] = self._push(replace(node, inputs=inputs))
        nodes, output = tuple(self._nodes), self._places[self._network.output]
        return Divided(Network(nodes, output), tuple(self._pieces))

    def _push(self, node: Node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _sum(self, node: Node, concatenation: int) -> int:
        """A linear layer over a concatenation, as the sum of those over its parts."""
        layer = node.layer
        assert isinstance(layer, Linear)
        columns = self._columns[concatenation]
        source = self._places[self._network.nodes[concatenation].inputs[0]]
        first, total, bias = 0, -1, layer.bias
        for name, count in columns:
            piece = f"{layer.weight}[:, {first}:{first + count}]"
            self._pieces.append(Piece(piece, layer.weight, node.shape[0], first, first + count))
            width = next(size for each, size in columns if each is None)
            read = source if name is None else self._row(name, count, source, width)
            flops = 2 * count * node.shape[0]
            place = self._push(Node(Linear(piece, bias), (read,), node.name, node.shape, flops))
            if first > 0:
                place = self._push(Node(Add(), (total, place), node.name, node.shape))
            total, bias, first = place, None, first + count
        return total

    def _row(self, name: str, count: int, source: int, width: int) -> int:
        """The layer that gives a parameter in every row."""
        if name not in self._rows:
            zeros = f"{name}, zeros"
            self._pieces.append(Piece(zeros, None, count, 0, width))
            flops = 2 * count * width
            self._rows[name] = self._push(
                Node(Linear(zeros, name), (source,), name, (count,), flops)
            )
        return self._rows[name]
