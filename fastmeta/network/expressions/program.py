"""Programs: expressions as lists of instructions, which the compiled kernels interpret.

Instructions come in three parts: what all examples share and is needed first, what is computed of
each block of examples, and what follows from the sums over them. Registers that are never needed
together share a slot. See csrc/expression.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastmeta.network.expressions.expression import (
    CONSTANT,
    INPUT,
    Expression,
    in_order,
    spread,
)
from fastmeta.network.expressions.generate import order

OTHERS = (
    "fill", "add_number", "multiply_number", "affine", "number_over", "multiply_add",
    "multiply_subtract", "subtract_product", "sine_cosine", "softplus_sigmoid",
    "tanh_softplus_sigmoid", "copy", "spread", "index", "count", "sum_columns", "max_columns",
    "sum_rows",
)  # fmt: skip
"""The instructions that no table of operations has, in the order of csrc/expression.h."""
NUMBERS = {name: number for number, name in enumerate((*order(), *OTHERS))}

_PAIRS = {"sine": "cosine", "softplus": "sigmoid", "tanh_softplus": "sigmoid"}
"""Operations that are computed together, with less than both take."""
_BEFORE, _EACH, _AFTER = range(3)
_MOST_INSTRUCTIONS, _MOST_SLOTS = 400, 64


class TooLong(Exception):
    """An expression whose program would be longer than the kernels take."""


@dataclass(frozen=True)
class Matrix:
    """Some columns of one of the kernels' matrices, by its number."""

    number: int
    first: int = 0
    adds: bool = False
    """Whether a result is added to what is there."""


Instruction = tuple[int, int, int, int, int, float, float]


@dataclass(frozen=True)
class Program:
    """A program as the compiled kernels take it."""

    code: tuple[tuple[Instruction, ...], ...]
    registers: tuple[tuple[bool, int, int], ...]
    inputs: tuple[tuple[int, int, int, bool], ...]
    outputs: tuple[tuple[int, int, int, bool], ...]
    slots: int

    @property
    def arguments(self) -> tuple[object, ...]:
        """The arguments of the kernels' own class."""
        return self.code, self.registers, self.inputs, self.outputs, self.slots


def program(
    results: Sequence[tuple[Expression, Matrix]], inputs: Mapping[Expression, Matrix]
) -> Program:
    """The program that computes each result into its matrix.

    **Raises** `TooLong`.
    """
    return _Compiler(inputs).compile(results)


@dataclass(eq=False)
class _Value:
    """A register while it is compiled."""

    of_examples: bool
    columns: int
    slot: int = -1
    shared: bool = False
    """Whether its slot is given to others once it is read no more."""
    last_read: int = -1


@dataclass(eq=False)
class _Step:
    name: str
    out: int
    reads: tuple[int, ...]
    p: float = 0.0
    q: float = 0.0
    second: int = -1
    """Of a pair of operations, the register of the second one."""


@dataclass(eq=False)
class _Compiler:
    inputs: Mapping[Expression, Matrix]
    values: list[_Value] = field(default_factory=list)
    parts: tuple[list[_Step], ...] = field(default_factory=lambda: ([], [], []))
    known: dict[int, int] = field(default_factory=dict)
    """The registers of expressions."""
    spreads: dict[tuple[int, bool, int], int] = field(default_factory=dict)
    after: set[int] = field(default_factory=set)
    """Expressions that follow from sums over the examples."""

    def compile(self, results: Sequence[tuple[Expression, Matrix]]) -> Program:
        self.nodes = in_order(result for result, _ in results)  # keeps them alive, as their ids
        self.reads: dict[int, int] = {}
        for node in self.nodes:
            for argument in node.arguments:
                self.reads[id(argument)] = self.reads.get(id(argument), 0) + 1
        self.wanted = {id(result) for result, _ in results}
        present = {(node.name, id(node.arguments[0])) for node in self.nodes if node.arguments}
        self.paired: dict[tuple[str, int], tuple[str, str]] = {}
        for pair in _PAIRS.items():
            for node in self.nodes:
                both = [(name, id(node.arguments[0])) for name in pair if node.name == pair[0]]
                if both and present.issuperset(both) and both[1] not in self.paired:
                    self.paired |= dict.fromkeys(both, pair)
        ports_in: list[tuple[int, int, int, bool]] = []
        for node in self.nodes:
            if node.name == INPUT and node in self.inputs:
                register = self._register(node.of_examples, node.columns)
                matrix = self.inputs[node]
                ports_in.append((matrix.number, matrix.first, register, False))
                self.known[id(node)] = register
        for node in self.nodes:
            if not self._is_fused(node):
                self._compute(node)
        ports_out: list[tuple[int, int, int, bool]] = []
        for result, matrix in results:
            register = self._of(result)
            if any(port[2] == register for port in ports_in) or result.name == CONSTANT:
                register = self._emit(result, "copy", (register,))
            self.values[register].shared = False
            ports_out.append((matrix.number, matrix.first, register, matrix.adds))
        slots = self._allocate()
        code = tuple(tuple(self._encoded(step) for step in part) for part in self.parts)
        if sum(map(len, code)) > _MOST_INSTRUCTIONS or slots > _MOST_SLOTS:
            raise TooLong(
                f"its program has {sum(map(len, code))} instructions on {slots} registers"
            )
        registers = tuple((v.of_examples, v.columns, v.slot) for v in self.values)
        return Program(code, registers, tuple(ports_in), tuple(ports_out), slots)

    def _register(self, of_examples: bool, columns: int, shared: bool = False) -> int:
        self.values.append(_Value(of_examples, columns, shared=shared))
        return len(self.values) - 1

    def _part(self, node: Expression) -> int:
        if node.of_examples:
            return _EACH
        if any(id(argument) in self.after for argument in node.arguments):
            self.after.add(id(node))
            return _AFTER
        return _BEFORE

    def _emit(
        self, node: Expression, name: str, reads: tuple[int, ...], p: float = 0.0, q: float = 0.0
    ) -> int:
        part = _EACH if name == "sum_rows" else self._part(node)
        out = self._register(node.of_examples, node.columns, shared=part == _EACH)
        if name == "sum_rows":
            self.values[out].shared = False
            self.after.add(id(node))
        self.parts[part].append(_Step(name, out, reads, p, q))
        self.known[id(node)] = out
        return out

    def _of(self, node: Expression) -> int:
        """The register of an expression; a number fills one."""
        if id(node) not in self.known:
            assert node.name == CONSTANT
            self._emit(node, "fill", (), node.value)
        return self.known[id(node)]

    def _as(self, argument: Expression, like: Expression) -> int:
        """An argument's register, spread to the shape of a result."""
        register = self._of(argument)
        shape = (like.of_examples, like.columns)
        if (argument.of_examples, argument.columns) == shape:
            return register
        key = (register, *shape)
        if key not in self.spreads:
            part = _EACH if argument.of_examples else _BEFORE
            if not argument.of_examples and id(argument) in self.after:
                part = _AFTER
            out = self._register(*shape, shared=part == _EACH)
            self.parts[part].append(_Step("spread", out, (register,)))
            self.spreads[key] = out
        return self.spreads[key]

    def _is_fused(self, node: Expression) -> bool:
        """Whether a product is computed with the one sum that reads it."""
        if node.name != "multiply" or id(node) in self.wanted or self.reads[id(node)] != 1:
            return False
        (reader,) = (n for n in self.nodes if any(a is node for a in n.arguments))
        if reader.name not in ("add", "subtract"):
            return False
        if (reader.of_examples, reader.columns) != (node.of_examples, node.columns):
            return False
        other = reader.arguments[1 if reader.arguments[0] is node else 0]
        if other.name == "multiply" and other is reader.arguments[0] and self._is_fused(other):
            return False  # one of the two is the instruction's own
        if node.arguments[0].number is not None:
            return other.number is not None
        return other.number is None

    def _compute(self, node: Expression) -> None:
        if node.name in (CONSTANT, INPUT) or id(node) in self.known:
            if node.name == INPUT and id(node) not in self.known:
                self._emit(node, node.value[0], ())
            return
        if node.name in ("held", "spread"):
            argument = node.arguments[0]
            register = self._as(argument, node)
            self.known[id(node)] = register
            if id(argument) in self.after:
                self.after.add(id(node))
            return
        if node.name == "peak":
            self._emit(node, "max_columns", (self._of(node.arguments[0]),))
        elif node.name in ("sum_columns", "max_columns"):
            self._emit(node, node.name, (self._of(node.arguments[0]),))
        elif node.name == "sum_rows":
            argument = node.arguments[0]
            full = spread(argument, True, argument.columns)
            self._emit(node, "sum_rows", (self._as(argument, full),))
        elif (node.name, id(node.arguments[0])) in self.paired:
            self._both(node)
        elif not self._with_number(node) and not self._with_product(node):
            reads = tuple(self._as(argument, node) for argument in node.arguments)
            self._emit(node, node.name, reads)

    def _both(self, node: Expression) -> None:
        """Both operations of a pair on one argument."""
        argument = node.arguments[0]
        pair = {n.name: n for n in self.nodes if n.arguments == (argument,)}
        first, second = self.paired[node.name, id(argument)]
        out = self._emit(pair[first], f"{first}_{second}", (self._of(argument),))
        step = self.parts[self._part(node)][-1]
        step.second = self._register(node.of_examples, node.columns, self.values[out].shared)
        self.known[id(pair[second])] = step.second

    def _with_number(self, node: Expression) -> bool:
        """Instructions that hold a number of their own."""
        if len(node.arguments) != 2:
            return False
        first, second = node.arguments
        a, b = first.number, second.number
        if node.name == "multiply" and a is not None:
            self._emit(node, "multiply_number", (self._as(second, node),), a)
        elif node.name == "add" and (a is not None or b is not None):
            number, other = (a, second) if a is not None else (b, first)
            assert number is not None
            self._affine(node, other, 1.0, number)
        elif node.name == "subtract" and b is not None:
            self._affine(node, first, 1.0, -b)
        elif node.name == "subtract" and a is not None:
            self._affine(node, second, -1.0, a)
        elif node.name == "divide" and a is not None:
            self._emit(node, "number_over", (self._as(second, node),), a)
        else:
            return False
        return True

    def _affine(self, node: Expression, argument: Expression, factor: float, shift: float) -> None:
        """`factor * argument + shift`, a product with a number taken in."""
        if id(argument) not in self.known and self._is_fused(argument):
            number = argument.arguments[0].number
            assert number is not None
            factor, argument = factor * number, argument.arguments[1]
        read = (self._as(argument, node),)
        if factor == 1.0:
            self._emit(node, "add_number", read, shift)
        else:
            self._emit(node, "affine", read, factor, shift)

    def _with_product(self, node: Expression) -> bool:
        """`a b + c`, `a b - c` or `c - a b` in one instruction."""
        if node.name not in ("add", "subtract"):
            return False
        first, second = node.arguments
        for product, other in ((first, second), (second, first)):
            if id(product) not in self.known and self._is_fused(product):
                name = "multiply_add"
                if node.name == "subtract":
                    name = "multiply_subtract" if product is first else "subtract_product"
                reads = (*product.arguments, other)
                self._emit(node, name, tuple(self._as(each, node) for each in reads))
                return True
        return False

    def _allocate(self) -> int:
        """Give each register a slot: of those of a block, one that nothing reads any more."""
        steps = self.parts[_EACH]
        for i, step in enumerate(steps):
            for read in step.reads:
                self.values[read].last_read = i
        free: list[int] = []
        count = 0
        for value in self.values:
            if not value.shared:
                value.slot, count = count, count + 1
        for i, step in enumerate(steps):
            for out in (step.out, step.second):
                if out >= 0 and self.values[out].shared:
                    if free:
                        self.values[out].slot = free.pop()
                    else:
                        self.values[out].slot, count = count, count + 1
            for register in {*step.reads, step.out, step.second}:
                if register < 0:
                    continue
                value = self.values[register]
                if value.shared and value.last_read <= i and value.slot >= 0:
                    free.append(value.slot)
                    value.shared = False  # it is given away once
        return count

    def _encoded(self, step: _Step) -> Instruction:
        a, b, c = (*step.reads, 0, 0, 0)[:3]
        if step.second >= 0:
            c = step.second
        return NUMBERS[step.name], step.out, a, b, c, step.p, step.q
