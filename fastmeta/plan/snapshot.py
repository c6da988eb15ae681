"""A model as it stood at its last step: while it holds, nothing about it is looked up again.

A plan depends on a model's modules, the attributes that its code reads, the places and kinds of its
tensors, hooks, and what its Python reads elsewhere (`guards`). All of it is compared by identity,
and what is compared is kept alive, so that no other object takes its address; constants that are
equal but not the same object count as the same. What the code does not read is not looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from operator import attrgetter, is_
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmeta.executors.problem import Slots
from fastmeta.plan.cache import Cache
from fastmeta.plan.complaint import refuse_scripted
from fastmeta.plan.guards import GLOBAL_HOOKS, INTERNAL, Guards, by_value, is_plain, is_torchs
from fastmeta.plan.vocabulary import ACTIVATION_MODULES

T = TypeVar("T")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_state = attrgetter("shape", "dtype", "requires_grad", "device")


class _Part:
    """One module of the model."""

    def __init__(self, module: nn.Module, guards: Guards) -> None:
        # The model's own life must not depend on what is kept of it.
        self.module = weakref.ref(module)
        self.kind = type(module)
        own = vars(module)
        options = ACTIVATION_MODULES.get(self.kind, ("", ()))[1]
        self.constants = [name for name in options if type(own.get(name)) is float]
        """Options that a step reads anew each time."""
        # Of a layer of torch's all attributes, of others those that code reads: also such that
        # are not there, because they would hide a method.
        read = {*own, "forward"} if is_torchs(self.kind) else guards.names
        watched = read - INTERNAL - {*self.constants}
        self.names = sorted(n for n in watched if n not in own or _is_kept(own[n], guards))
        self.values = [*map(own.get, self.names)]
        self.tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
        self.children = [*map(id, own["_modules"].values())]
        self.hooks = [len(own[name]) for name in _HOOKS]

    def holds(self) -> bool:
        """Tell whether the module is still as it was."""
        module = self.module()
        if module is None or type(module) is not self.kind:
            return False
        own = vars(module)
        values = [*map(own.get, self.names)]
        if not all(map(is_, values, self.values)):
            if [*map(by_value, values)] != [*map(by_value, self.values)]:
                return False
            self.values = values
        tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
        # A child that is alive has its address to itself, and all of these are: they are parts.
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and [*map(id, own["_modules"].values())] == self.children
            and [len(own[name]) for name in _HOOKS] == self.hooks
        )

    def key(self) -> Hashable:
        """All of it by value."""
        values = [*map(by_value, self.values)]
        return self.kind, *self.names, *values, *self.constants, *map(bool, self.hooks)


def _is_kept(value: Any, guards: Guards) -> bool:
    """Tell whether an attribute may be kept: a constant or a function, which holds no module."""
    own = isinstance(value, FunctionType) and not guards.unseen
    return own or is_plain(value) or is_torchs(value)


class Snapshot:
    """The modules, tensors and guards of a model, and what follows from them alone."""

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        for label, module in model.named_modules():
            refuse_scripted(module, f"model: {label}")
        self._guards = guards = Guards(model)
        self.unseen = guards.unseen
        """What its Python reads that no guard can watch; empty where there is no such thing."""
        self._parts = [_Part(module, guards) for module in model.modules()]
        self._constants = [
            (part.module, f"{name}.{option}".lstrip("."), option)
            for (name, _), part in zip(model.named_modules(), self._parts, strict=True)
            for option in part.constants
        ]
        self.constants: dict[str, float] = {}
        """Options of activations by name, as they are now: arguments of a step, not of its plan."""
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"model: {name} is not initialised yet (a lazy module); run the model once "
                    "first"
                )
        self.devices = {p.device.type for p in self.parameters.values()}
        self._tensors: list[Tensor] = [*self.parameters.values(), *model.buffers()]
        self._states = [*map(_state, self._tensors)]
        self._hooks = [*map(len, GLOBAL_HOOKS)]
        self.learns_buffers = any(buffer.requires_grad for buffer in model.buffers())
        self.slots = Slots(model)
        self.compiled = any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        )
        parts = tuple(part.key() for part in self._parts)
        hooks, states = tuple(map(bool, self._hooks)), tuple(self._states)
        self._cache = cache
        # Models that are alike by value share what was found.
        key = (parts, _places(model), states, hooks, guards.key(), self.unseen)
        self._token = cache.find(("snapshot", key), object)

    def holds(self) -> bool:
        """Tell whether the model is still the one that was looked at."""
        return (
            all(part.holds() for part in self._parts)
            and self._read_constants()
            and [*map(len, GLOBAL_HOOKS)] == self._hooks
            and self._guards.hold()
            and [*map(_state, self._tensors)] == self._states
        )

    def _read_constants(self) -> bool:
        for part, name, option in self._constants:
            value = vars(part())[option]
            if type(value) is not float:
                return False
            self.constants[name] = value
        return True

    def signs(self) -> Hashable:
        """What a plan depends on of the constants."""
        return tuple((value > 0) - (value < 0) for value in self.constants.values())

    def known(self, key: Hashable, find: Callable[[], T]) -> T:
        """What `find` gives for `key`, found once."""
        return self._cache.find((self._token, key), find)


def _places(model: nn.Module) -> Hashable:
    """The names at which each module, parameter and buffer is found."""
    found = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    order: dict[int, int] = {}
    return tuple((name, order.setdefault(id(each), len(order))) for name, each in found)


_snapshots: weakref.WeakKeyDictionary[nn.Module, tuple[Snapshot, Cache]] = (
    weakref.WeakKeyDictionary()
)


def snapshot(model: nn.Module) -> Snapshot:
    """The model's snapshot, taken anew where it no longer holds; one thread a model at a time."""
    kept = _snapshots.get(model)
    if kept is not None and kept[0].holds():
        return kept[0]
    cache = Cache() if kept is None else kept[1]
    taken = Snapshot(model, cache)
    taken._read_constants()
    _snapshots[model] = taken, cache
    return taken


def clear_cache(model: nn.Module | None = None) -> None:
    """Forget what was found for a model, so that its next step looks at it anew.

    A step sees by itself what changes in the model's modules, tensors, hooks and attributes, and in
    the functions and constants that its `forward` reads. It can't see what a C extension computes
    by, or a class of torch's own that was altered in place: call this after such a change.

    **Arguments:** `model`: the module that was stepped; None for every one.
    """
    if model is None:
        _snapshots.clear()
    else:
        _snapshots.pop(getattr(model, "_orig_mod", model), None)
