"""Calls of a traced `forward` that compute number by number, gathered into one expression."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmeta.network.expressions import vocabulary
from fastmeta.network.expressions.expression import CONSTANT, INPUT, Expression, in_order
from fastmeta.network.expressions.tracing import EXAMPLES, Symbol, Trace, Untraceable, answer
from fastmeta.network.layers.activation import Activation
from fastmeta.network.layers.elementwise import ENTRY
from fastmeta.network.provenance import is_torchs
from fastmeta.network.vocabulary import ACTIVATION_MODULES

_ROUNDED = {"truediv": "div", "and_": "and", "or_": "or", "inv": "invert"}


@dataclass(eq=False)
class Pending:
    """An expression of a layer's output, until a layer reads it."""

    source: int
    expression: Expression
    call: fx.Node
    """The first call that gives it."""
    layer: int | None = None
    """The layer that it has become."""


class _Entry(Symbol):
    """A number, of whatever shape of tensor it stands in."""

    allowed = vocabulary.ELEMENTWISE


def _entry(expression: Expression) -> _Entry:
    return _Entry(expression, (EXAMPLES,), Trace(torch.get_default_dtype()))


def expression(activation: Activation) -> Expression:
    """The expression of `ENTRY` that a standard activation is."""
    with torch.enable_grad():  # as in `read`
        return answer(activation.kind, (_entry(ENTRY),), dict(activation.options)).expression


def read(
    node: fx.Node, values: Mapping[Any, Any], modules: Mapping[str, nn.Module]
) -> Pending | None:
    """The expression that a call is, of one layer's output; None where it is none."""
    name = _name(node, modules)
    if name not in vocabulary.ELEMENTWISE or node.kwargs.get("inplace", False):
        return None
    sources: set[int] = set()
    pending: list[Pending] = []

    def symbol(argument: fx.Node) -> Symbol:
        value = values[argument]
        if isinstance(value, Pending):
            pending.append(value)
            sources.add(value.source)
            return _entry(value.expression)
        if type(value) is not int:
            raise Untraceable("it reads what is no layer's output")
        sources.add(value)
        return _entry(ENTRY)

    given: Any = symbol  # which fx's types know nothing of
    try:
        with torch.enable_grad():  # whatever the caller's mode: without it symbols are constants
            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            if node.op == "call_module":
                module: Any = modules[str(node.target)]
                result = type(module).forward(module, *args, **kwargs)
            else:
                result = answer(name, tuple(args), dict(kwargs))
    except (Untraceable, TypeError):
        return None
    if len(sources) != 1 or not isinstance(result, Symbol) or result.axes != (EXAMPLES,):
        return None
    if not _is_of_entry(result.expression):
        return None
    same = (each for each in pending if each.expression is result.expression)
    return next(same, None) or Pending(sources.pop(), result.expression, node)


def _name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """A name in the vocabulary; empty where a call is none of torch's or Python's own."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if ACTIVATION_MODULES.get(type(module), ("", ()))[1]:
            return ""  # its options are arguments of a step, not parts of an expression
        plain = is_torchs(type(module)) and not any(module.children())
        stateless = not [*module.parameters(), *module.buffers()]
        return "module" if plain and stateless and is_torchs(type(module).forward) else ""
    if node.op == "call_method":
        method = getattr(Tensor, str(node.target), None)
        return str(node.target) if is_torchs(method) else ""
    if not is_torchs(node.target):
        return ""
    name = getattr(node.target, "__name__", "")
    return _ROUNDED.get(name, name) if vars(operator).get(name) is node.target else name


def _is_of_entry(expression: Expression) -> bool:
    order = in_order([expression])
    leaves = [node for node in order if node.name in (CONSTANT, INPUT)]
    plain = all(node.columns == 1 and node.name not in ("sum_rows",) for node in order)
    return plain and ENTRY in leaves and all(n is ENTRY or n.name == CONSTANT for n in leaves)
