"""What a model's Python reads beside tensors, so that a plan is never older than that.

A plan that computes in the module's stead is only as good as the `forward` it was read from. Plain
values that a `forward` reads are watched; where it reads anything else, nothing can watch it.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_MODULES = ("torch", "math", "operator", "functools", "typing")


class Watch(NamedTuple):
    """A value that a `forward` reads, and where it reads it."""

    place: Mapping[str, Any]
    name: str
    value: Any

    def holds(self) -> bool:
        """Whether it is still the same."""
        return self.place.get(self.name) is self.value


class Unpinned(Exception):
    """A `forward` reads what can't be watched; the message says what."""


def watches(model: nn.Module) -> list[Watch]:
    """Everything that the model's own Python reads; **raises** `Unpinned`."""
    found: dict[tuple[int, str], Watch] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or _is_torchs(forward):
            continue
        for watch in _Reading(module).member("forward"):
            found[id(watch.place), watch.name] = watch
    return list(found.values())


class _Reading:
    """One module's forward, and the functions that it calls."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen: set[int] = set()

    def function(self, function: types.FunctionType) -> Iterator[Watch]:
        if id(function.__code__) in self._seen:
            return
        self._seen.add(id(function.__code__))
        cells = inspect.getclosurevars(function).nonlocals
        for name, value in cells.items():
            if name != "__class__":
                yield from self._value(types.MappingProxyType(cells), name, value)
        for name in _names(function.__code__):
            own = vars(self._module)
            if name in function.__globals__:
                yield from self._value(function.__globals__, name, function.__globals__[name])
            if name in own:
                yield from self._value(own, name, own[name])
            elif not hasattr(nn.Module, name):
                yield from self.member(name)

    def member(self, name: str) -> Iterator[Watch]:
        """What a method, a property or a constant of the module's class reads, and itself."""
        for kind in type(self._module).__mro__:
            if name not in vars(kind):
                continue
            held = value = vars(kind)[name]
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if isinstance(value, types.FunctionType):
                yield Watch(vars(kind), name, held)
                yield from self.function(value)
            else:
                yield from self._value(vars(kind), name, value)
            return

    def _value(self, place: Mapping[str, Any], name: str, value: Any) -> Iterator[Watch]:
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _MODULES:
                raise Unpinned(f"its forward reads the module {value.__name__}")
        elif isinstance(value, (*_PLAIN, type)) or _is_plain_tuple(value) or _is_torchs(value):
            yield Watch(place, name, value)
        elif isinstance(value, types.FunctionType):
            yield Watch(place, name, value)
            yield from self.function(value)
        else:
            raise Unpinned(
                f"its forward reads {name}, a {type(value).__name__}, which may change unseen"
            )


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(entry, _PLAIN) for entry in value)


def _is_torchs(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return callable(value) and (
        module.split(".")[0] in _MODULES or isinstance(value, types.BuiltinFunctionType)
    )


def _names(code: types.CodeType) -> set[str]:
    """All globals and attributes that the code or a function inside it names."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
