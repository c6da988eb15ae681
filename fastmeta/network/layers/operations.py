"""Torch's own modules, functions and methods in order, run as torch runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.network.layers.layer import Tensors
from fastmeta.network.stateless import StatelessModel, swapping


@dataclass(frozen=True)
class Input:
    """A value that the operations are given, by its place."""

    place: int


@dataclass(frozen=True)
class Named:
    """A parameter or buffer of the model."""

    name: str


@dataclass(frozen=True)
class Result:
    """What an earlier operation gave."""

    place: int


@dataclass(frozen=True)
class Operation:
    """A call; its arguments are constants and the references above, in any tree."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A tensor's method as a function."""

    name: str

    def __call__(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, self.name)(*args, **kwargs)


class _Called(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.module(*args, **kwargs)


@dataclass(eq=False)
class ModuleCall:
    """A module as a function of tensors by the model's names; a copy that holds no data."""

    module: nn.Module
    names: Mapping[str, str]
    """By the module's own names."""
    _stateless: StatelessModel | None = field(default=None, repr=False)

    @classmethod
    def of(cls, module: nn.Module, names: Mapping[str, str]) -> ModuleCall:
        """Copy the module without its tensors; its layers write nothing in place."""
        memo: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = empty
        twin = copy.deepcopy(module, memo)
        for part in twin.modules():
            if getattr(part, "inplace", False):
                setattr(part, "inplace", False)  # noqa: B010
        return cls(twin, names)

    def __call__(self, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with these tensors in place of its own."""
        if self._stateless is None:
            self._stateless = StatelessModel(_Called(self.module))
        given = {f"module.{name}": tensors[known] for name, known in self.names.items()}
        mha = torch.backends.mha
        with swapping:
            # The fused inference kernels have neither derivatives nor batching rules.
            before = mha.get_fastpath_enabled()
            mha.set_fastpath_enabled(False)
            try:
                return self._stateless(given, (args, kwargs), {})
            finally:
                mha.set_fastpath_enabled(before)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stateless": None}


def evaluate(operations: Sequence[Operation], tensors: Tensors, inputs: Sequence[Tensor]) -> Any:
    """What the last operation gives."""
    results: list[Any] = []

    def value(given: Any) -> Any:
        if isinstance(given, Input):
            return inputs[given.place]
        if isinstance(given, Named):
            return tensors[given.name]
        if isinstance(given, Result):
            return results[given.place]
        return mapped(value, given)

    for operation in operations:
        args, kwargs = value(operation.args), value(operation.kwargs)
        if isinstance(operation.target, ModuleCall):
            results.append(operation.target(tensors, args, kwargs))
        else:
            results.append(operation.target(*args, **kwargs))
    return results[-1]


def mapped(change: Callable[[Any], Any], given: Any) -> Any:
    """A tree of arguments with its entries changed; anything else as it is."""
    if isinstance(given, tuple):
        return tuple(map(change, given))
    if isinstance(given, list):
        return [*map(change, given)]
    if isinstance(given, Mapping):
        return {key: change(each) for key, each in given.items()}
    if isinstance(given, slice):
        return slice(change(given.start), change(given.stop), change(given.step))
    return given
