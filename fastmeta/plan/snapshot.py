"""A model as it stood at its last step: while it holds, nothing about it is looked up again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from inspect import isbuiltin, isfunction
from numbers import Number
from operator import attrgetter
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.executors.problem import Slots
from fastmeta.plan.pinned import GLOBAL_HOOKS, Unpinned, Watch, watches

_KEPT = 64
_PLAIN = (bool, int, float, str, type(None))

T = TypeVar("T")


_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that torch never binds anew."""


def _identities(module: nn.Module, names: list[str]) -> list[int]:
    """Of the named attributes, parameters, buffers and children; how many attributes and hooks."""
    own = module.__dict__
    return [
        id(type(module)),
        len(own),
        *map(id, map(own.get, names)),
        *map(id, own["_parameters"].values()),
        *map(id, own["_buffers"].values()),
        *map(id, own["_modules"].values()),
        len(own["_forward_hooks"]),
        len(own["_forward_pre_hooks"]),
        len(own["_backward_hooks"]),
        len(own["_backward_pre_hooks"]),
    ]


class Snapshot:
    """The modules, parameters and plain attributes of a model, and what follows from them alone."""

    def __init__(self, model: nn.Module) -> None:
        # The model's own life must not depend on what is kept of it; but what is known by its
        # identity, and could be gone, is kept, so that no other takes that identity.
        self._modules: list[tuple[weakref.ref[nn.Module], list[str]]] = []
        self._identities: list[int] = []
        self._kept: list[Any] = []
        identity: list[Hashable] = _places(model)
        for label, module in model.named_modules():
            refuse_scripted(module, f"model: {label}")
            attributes = vars(module)
            plain = [value for value in attributes.values() if type(value) in _PLAIN]
            names = [name for name in attributes if name not in _INTERNAL]
            found = _identities(module, names)
            self._modules.append((weakref.ref(module), names))
            self._identities += found
            self._kept += [*plain, *module._parameters.values(), *module._buffers.values()]
            hooks = [bool(count) for count in found[-4:]]
            # A forward may branch on attributes.
            values = [_told_apart(attributes[name]) for name in names]
            identity += (*names, *values, *module._parameters, *hooks)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"model: {name} is not initialised yet (a lazy module); run the model once "
                    "first"
                )
        self.devices = {p.device.type for p in self.parameters.values()}
        self._tensors: list[Tensor] = [*self.parameters.values(), *model.buffers()]
        self.learns_buffers = any(buffer.requires_grad for buffer in model.buffers())
        self._hooks = _global_hooks()
        self._states = _states(self._tensors)
        self.unpinned = ""
        """What its Python reads that no snapshot can see; empty where there is no such thing."""
        self._watches: list[Watch] = []
        try:
            self._watches = watches(model)
        except Unpinned as reason:
            self.unpinned = str(reason)
        read = [(watch.name, _by_value(watch.value)) for watch in self._watches]
        self.key: Hashable = (*identity, *self._states, *self._hooks, *read)
        """What a plan depends on of the model, by value."""
        self.slots = Slots(model)
        self.compiled = any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        )
        self._known: dict[Hashable, Any] = {}

    def holds(self) -> bool:
        """Whether the model is still the one that was looked at."""
        identities: list[int] = []
        for reference, names in self._modules:
            module = reference()
            if module is None:
                return False
            identities += _identities(module, names)
        if identities != self._identities:
            return False
        if _global_hooks() != self._hooks:
            return False
        for watch in self._watches:
            if not watch.holds():
                return False
        return _states(self._tensors) == self._states

    def known(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` gives for `key`, found once."""
        found = self._known.get(key)
        if found is None:
            while len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            found = self._known[key] = find()
        return found


def refuse_scripted(module: nn.Module, label: str) -> None:
    """**Raises** `TypeError` for a module of TorchScript, which holds its parameters fast."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{label}: scripted or traced by torch.jit, whose parameters can't be exchanged for "
            "adapted ones; step the module that it was made of"
        )


def _places(model: nn.Module) -> list[Hashable]:
    """Which module, parameter and buffer is found at which names."""
    modules = [(name, id(m), type(m)) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    order: dict[int, int] = {}
    return [*modules, *((n, order.setdefault(id(t), len(order))) for n, t in tensors)]


def _told_apart(value: Any) -> Hashable:
    """Numbers and tuples of them by value, functions by identity, others by type."""
    if isinstance(value, (tuple, list)):
        return type(value), *map(_told_apart, value)
    if isinstance(value, (str, Number, type(None))):
        return type(value), value
    return (type(value), id(value)) if isfunction(value) or isbuiltin(value) else type(value)


def _by_value(value: Any) -> Hashable:
    # A function may hold the model, which must not hold itself.
    if isinstance(value, FunctionType):
        return value.__code__, id(value)
    return value if isinstance(value, (*_PLAIN, tuple)) else (type(value), id(value))


def _global_hooks() -> tuple[int, ...]:
    """How many hooks there are on every module."""
    return tuple(map(len, GLOBAL_HOOKS))


_state = attrgetter("shape", "dtype", "requires_grad", "device")


def _states(tensors: list[Tensor]) -> list[Hashable]:
    return [*map(_state, tensors)]


_snapshots: weakref.WeakKeyDictionary[nn.Module, Snapshot] = weakref.WeakKeyDictionary()


def snapshot(model: nn.Module) -> Snapshot:
    """The model's snapshot, taken anew where it no longer holds; one thread a model at a time."""
    kept = _snapshots.get(model)
    if kept is None or not kept.holds():
        kept = _snapshots[model] = Snapshot(model)
    return kept


def forget() -> None:
    """Drops every snapshot, for tests that change how a step is chosen."""
    _snapshots.clear()
