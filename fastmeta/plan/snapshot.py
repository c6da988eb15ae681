"""A model as it stood at its last step: while it holds, nothing about it is looked up again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import is_
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmeta.executors.problem import Slots
from fastmeta.plan.pinned import Unpinned, Watch, watches

_KEPT = 64
_PLAIN = (bool, int, float, str, type(None))

T = TypeVar("T")


@dataclass(eq=False)
class _Part:
    """One module of the model, and what it held."""

    module: weakref.ref[nn.Module]  # the model's own life must not depend on what is kept of it
    attributes: list[int]
    """Their identities."""
    plain: list[Any]
    """Those that are plain, kept so that no other can take their identity."""
    held: list[Any]
    """Parameters, buffers and children."""

    def holds(self) -> bool:
        module = self.module()
        if module is None or [*map(id, vars(module).values())] != self.attributes:
            return False
        held = _held(module)
        return len(held) == len(self.held) and all(map(is_, held, self.held))


def _held(module: nn.Module) -> list[Any]:
    return [
        *module._parameters.values(),
        *module._buffers.values(),
        *module._modules.values(),
        not module._forward_hooks,
        not module._forward_pre_hooks,
        not module._backward_hooks,
        not module._backward_pre_hooks,
    ]


class Snapshot:
    """The modules, parameters and plain attributes of a model, and what follows from them alone."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[_Part] = []
        identity: list[Hashable] = []
        for module in model.modules():
            attributes = vars(module)
            # Plain attributes by value, others by type: a forward may branch on them.
            kinds = [type(value) for value in attributes.values()]
            plain = [value for value in attributes.values() if type(value) in _PLAIN]
            held = _held(module)
            self._parts.append(
                _Part(weakref.ref(module), [*map(id, attributes.values())], plain, held)
            )
            identity += (id(module), *attributes, *kinds, *plain, *module._parameters, *held[-4:])
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"model: {name} is not initialised yet (a lazy module); run the model once "
                    "first"
                )
        self.devices = {p.device.type for p in self.parameters.values()}
        self._tensors: list[Tensor] = [*self.parameters.values()]
        self._states = _states(self._tensors)
        self.unpinned = ""
        """What its Python reads that no snapshot can see; empty where there is no such thing."""
        self._watches: list[Watch] = []
        try:
            self._watches = watches(model)
        except Unpinned as reason:
            self.unpinned = str(reason)
        read = [(watch.name, _by_value(watch.value)) for watch in self._watches]
        self.key: Hashable = (*identity, *self._states, *read)
        """What a plan depends on of the model, by value."""
        self.slots = Slots(model)
        self.compiled = any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        )
        self._known: dict[Hashable, Any] = {}

    def holds(self) -> bool:
        """Whether the model is still the one that was looked at."""
        for part in self._parts:
            if not part.holds():
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


def _by_value(value: Any) -> Hashable:
    # A function may hold the model, which must not hold itself.
    if isinstance(value, FunctionType):
        return value.__code__, id(value)
    return value if isinstance(value, (*_PLAIN, tuple)) else (type(value), id(value))


def _states(tensors: list[Tensor]) -> list[Hashable]:
    return [(t.shape, t.dtype, t.requires_grad, t.device) for t in tensors]


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
