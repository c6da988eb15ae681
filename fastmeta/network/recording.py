"""A function of tensors as the operators that it runs, without its Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.network.layers.operations import mapped


def recorded(function: Callable[..., Any], tensors: Sequence[Tensor]) -> fx.GraphModule | None:
    """The operators that a function runs on tensors; None where they are no function of these.

    They hold for tensors of the same shapes, strides and dtypes. `function` gives a tensor or a
    tuple of such. Derivatives and maps over tasks leave their operators alone.
    """
    recorder = _Recorder(tensors)
    try:
        with recorder:
            output = function(*tensors)
        recorder.graph.output(recorder.node_of(output))
    except Exception:  # of what kind differs; one of the function's own comes again
        return None
    if not recorder.writes:
        recorder.graph.eliminate_dead_code()
    return fx.GraphModule(nn.Module(), recorder.graph)


class _Untraceable(Exception):
    """What the operators do depends on more than the tensors given."""


class _Recorder(TorchDispatchMode):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.writes = False
        self._alive = [*tensors]  # so that no other tensor takes an address
        self._nodes = {id(t): self.graph.placeholder(f"t{i}") for i, t in enumerate(tensors)}

    def node_of(self, value: Any) -> Any:
        """The tree of a call's arguments with nodes for tensors."""
        if not isinstance(value, Tensor):
            return mapped(self.node_of, value)
        node = self._nodes.get(id(value))
        if node is None:
            raise _Untraceable
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tags = func.tags
        if torch.Tag.nondeterministic_seeded in tags or torch.Tag.data_dependent_output in tags:
            raise _Untraceable
        node = self.graph.call_function(func, self.node_of(args), self.node_of(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.writes |= func._schema.is_mutable
        self._give(node, out)
        return out

    def _give(self, node: fx.Node, out: Any) -> None:
        if isinstance(out, Tensor):
            # What an operator wrote in place keeps its node: nothing reads it out of order.
            if id(out) not in self._nodes:
                self._alive.append(out)
                self._nodes[id(out)] = node
            return
        if isinstance(out, (tuple, list)):
            for i, each in enumerate(out):
                if isinstance(each, (Tensor, tuple, list)):
                    item = self.graph.call_function(_item, (node, i))
                    self._give(item, each)
        elif out is not None:
            raise _Untraceable  # a number, which Python may branch on


def _item(values: Sequence[Any], place: int) -> Any:
    return values[place]
