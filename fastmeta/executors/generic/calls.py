"""Calls of modules and functions, told apart by their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Call:
    """A call's result, and the versions of the tensors that went in and came out."""

    def __init__(self, output: Any, tensors: list[Tensor]) -> None:
        self._output = output
        self._written = _may_be_written(output)
        self._tensors = [(tensor, tensor._version) for tensor in tensors]

    def holds(self) -> bool:
        """Return whether nothing was written to them since."""
        return all(tensor._version == version for tensor, version in self._tensors)

    @property
    def output(self) -> Any:
        """The result; lists and dicts in it are the caller's own."""
        if self._written:
            return mapped(lambda leaf: leaf, self._output)
        return self._output


_PLAIN = frozenset(
    (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.device,
     torch.layout, torch.memory_format)
)  # fmt: skip


def reads_parameters(called: Any, tensors: list[Tensor], given: frozenset[int]) -> bool:
    """Report a module that has parameters, or a function that is called with one."""
    if isinstance(called, nn.Module):
        return any(True for _ in called.parameters())
    return any(isinstance(tensor, nn.Parameter) or id(tensor) in given for tensor in tensors)


def _may_be_written(tree: Any) -> bool:
    """Report a list or a dict in a result."""
    if isinstance(tree, tuple):
        return any(map(_may_be_written, tree))
    return isinstance(tree, (list, dict))


class Opaque(Exception):
    """An argument that can't be compared."""


def key_of(value: Any, tensors: list[Tensor]) -> Any:
    """A key of arguments: tensors by identity, numbers by value; gathers the tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, id(value)
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, (tuple, list)):
        return kind, *[key_of(item, tensors) for item in value]
    if kind is dict:
        return kind, *[(name, key_of(item, tensors)) for name, item in value.items()]
    if kind is slice:
        return kind, *[key_of(part, tensors) for part in (value.start, value.stop, value.step)]
    raise Opaque(kind.__name__)


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree that `key_of` accepts, with another tensor in each tensor's place."""
    if isinstance(tree, Tensor):
        return function(tree)
    kind = type(tree)
    if kind is dict:
        return {name: mapped(function, item) for name, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [mapped(function, item) for item in tree]
        return kind._make(items) if hasattr(kind, "_make") else kind(items)
    return tree
