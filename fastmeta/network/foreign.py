"""Modules and functions without rules of their own: which may be layers, and the layers of them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fastmeta.network import vocabulary as words
from fastmeta.network.layers import Foreign
from fastmeta.network.layers.operations import (
    Input,
    Method,
    ModuleCall,
    Named,
    Operation,
    Result,
    mapped,
)
from fastmeta.network.provenance import is_of_arguments, is_plain, is_torchs

_INTERNAL = frozenset(vars(nn.Module()))
_CONSTANTS = (torch.memory_format, torch.layout, type(Ellipsis))


@dataclass(frozen=True)
class Fact:
    """A node's value in a pass over the example."""

    shape: tuple[int, ...] | None = None
    """None of what is no floating tensor."""
    writes: bool = False
    """Whether the call wrote to one of its arguments."""

    def leads_with(self, count: int) -> bool:
        """Return whether it is a value for so many examples."""
        return self.shape is not None and self.shape[:1] == (count,)


def facts(root: nn.Module, graph: fx.Graph, example: Tensor) -> dict[fx.Node, Fact]:
    """What every node gives on the example; of a trace's own copy of the module."""
    watching = _Watching(root, graph)
    with torch.no_grad():
        watching.run(example.detach().clone(), *_nothing(graph))
    return watching.facts


def _nothing(graph: fx.Graph) -> list[None]:
    return [None for node in graph.nodes if node.op == "placeholder"][1:]


class _Watching(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.facts: dict[fx.Node, Fact] = {}

    def run_node(self, n: fx.Node) -> Any:
        versions: list[tuple[Tensor, int]] = []

        def see(value: Any) -> Any:
            if isinstance(value, Tensor):
                versions.append((value, value._version))
            return value

        map_aggregate(tuple(self.env.get(each) for each in n.all_input_nodes), see)
        value = super().run_node(n)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        self.facts[n] = Fact(
            tuple(value.shape) if floating else None,
            n.op != "call_module" and any(t._version != before for t, before in versions),
        )
        return value


def refusal(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The reason why a call can't be run in the module's stead; None where it can.

    What it computes must depend on its arguments and on what guards watch, and on nothing else.
    """
    if node.op == "call_module":
        return _refusal_of_module(str(node.target), modules[str(node.target)])
    name = called(node)
    if node.op == "call_method":
        method = getattr(Tensor, name, None)
        if method is None or not is_torchs(method) or name in words.LEAVING_METHODS:
            return f"its forward calls the method {name!r}"
    elif node.target is getattr:
        if node.args[1] not in words.PLAIN_ATTRIBUTES:
            return f"its forward reads {node.args[1]} of a tensor"
    elif not is_torchs(node.target) or not is_of_arguments(node.target):
        return f"its forward calls {name}, whose answer may change unseen"
    constants: list[Any] = []
    map_aggregate((node.args, node.kwargs), constants.append)  # pyright: ignore[reportArgumentType]
    for each in constants:
        if not (isinstance(each, (fx.Node, slice, *_CONSTANTS)) or is_plain(each)):
            return f"its forward calls {name} with {type(each).__name__}"
    return None


def _refusal_of_module(name: str, module: nn.Module) -> str | None:
    for inner, part in module.named_modules():
        label, kind = f"{name}.{inner}".rstrip("."), type(part)
        if not is_torchs(kind):
            return f"layer {label!r} ({kind.__name__}) is called by one of torch's own"
        _, options = words.ACTIVATION_MODULES.get(kind, ("", ()))
        if any(type(getattr(part, option)) is float for option in options):
            return f"layer {label!r} ({kind.__name__}) has options that are a step's arguments"
        for attribute, value in vars(part).items():
            if attribute.startswith("_") or attribute in _INTERNAL:
                continue
            if not is_plain(value) and not is_torchs(value):
                return (
                    f"layer {label!r} has a {type(value).__name__}, {attribute}, "
                    "which may change unseen"
                )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and (
            part.max_norm is not None or part.sparse
        ):
            return f"layer {label!r} writes its weights, or has sparse gradients"
    return None


def draws(module: nn.Module) -> bool:
    """Return whether a module, or one inside it, draws random numbers."""
    for part in module.modules():
        chances = (part.p,) if isinstance(part, words.DROPOUTS) else ()
        chances += (getattr(part, "dropout", 0.0),)
        if part.training and any(isinstance(p, float) and p > 0 for p in chances):
            return True
    return False


def layer(
    run: Sequence[fx.Node], values: Mapping[fx.Node, Any], reasons: Mapping[fx.Node, str],
    modules: Mapping[str, nn.Module], names: Mapping[str, str], parameters: Container[str],
) -> tuple[Foreign, tuple[int, ...]]:  # fmt: skip
    """The layer that calls torch as the nodes of `run` do, and the values that it reads.

    **Arguments:** `values`: by other node, an index or a tensor's name; `reasons`: by node, why it
    is no layer with rules; `names`: the canonical ones of all tensors.
    """
    place = {node: i for i, node in enumerate(run)}
    sources: dict[int, int] = {}
    read: dict[str, None] = {}

    def find(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return mapped(find, value)
        if value in place:
            return Result(place[value])
        known = values[value]
        if isinstance(known, int):
            return Input(sources.setdefault(known, len(sources)))
        read[known] = None
        return Named(known)

    operations: list[Operation] = []
    for node in run:
        target: Any = node.target
        if node.op == "call_method":
            target = Method(str(target))
        elif node.op == "call_module":
            module = modules[str(target)]
            own = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            target = ModuleCall.of(module, {name: names[f"{target}.{name}"] for name in own})
            read.update(dict.fromkeys(target.names.values()))
        operations.append(Operation(target, find(tuple(node.args)), find(dict(node.kwargs))))
    strangers = [node for node in run if node in reasons]
    made = Foreign(
        operations=tuple(operations),
        names=tuple(name for name in read if name in parameters),
        buffers=tuple(name for name in read if name not in parameters),
        kind=_kind(strangers, modules),
        reason=reasons[strangers[0]],
    )
    return made, tuple(sources)


def _kind(run: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> str:
    """The first of the calls in words, and how many there are."""
    words = [
        type(modules[str(node.target)]).__name__ if node.op == "call_module" else called(node)
        for node in run
    ]
    words = [word for word in words if word not in ("getitem", "getattr")] or words
    return words[0] if len(words) == 1 else f"{words[0]} (and {len(words) - 1})"


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")
