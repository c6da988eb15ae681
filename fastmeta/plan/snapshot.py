"""A model as it stood at its last step: while it holds, nothing about it is looked up again.

A plan depends on a model's modules, the attributes that its code reads, the places and kinds of its
tensors, hooks, and what its Python reads elsewhere (`guards`). All of it is compared by identity,
and what is compared is kept alive, so that no other object takes its address; constants that are
equal but not the same object count as the same. What the code does not read is not looked at.
A value that cannot be kept (a list) is not compared; once a constant takes its place, the model is
looked at anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Set
from operator import attrgetter, is_, itemgetter
from types import FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmeta.network.errors import refuse_unready
from fastmeta.network.hooks import GLOBAL_HOOKS
from fastmeta.network.provenance import by_value, is_plain, is_torchs
from fastmeta.network.stateless import Slots
from fastmeta.network.vocabulary import ACTIVATION_MODULES
from fastmeta.plan.cache import Cache
from fastmeta.plan.guards import INTERNAL, Guards
from fastmeta.wording import a_kind

T = TypeVar("T")

_tables = itemgetter(
    "_parameters", "_buffers", "_modules",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_state = attrgetter("shape", "dtype", "requires_grad", "device")


class Snapshot:
    """The modules, tensors and guards of a model, and what follows from them alone."""

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        self._guards = guards = Guards(model)
        self.unseen = guards.unseen
        """The first thing that its Python reads and no guard can watch; empty if none."""
        self.writes = guards.writes
        """The first thing that its Python writes; empty if none."""
        self.unwatched = ""
        """The first option of a layer of torch's that can't be watched; empty if none."""
        # The model's own life must not depend on what is kept of it.
        self._parts: list[tuple[weakref.ref[nn.Module], list[str]]] = []
        self._constants: list[tuple[weakref.ref[nn.Module], str, str]] = []
        self._left_out: list[tuple[weakref.ref[nn.Module], str, str]] = []
        """Attributes that code reads and whose values may not be kept."""
        self.constants: dict[str, Any] = {}
        """Options of activations by name, as they are now: arguments of a step, not of its plan."""
        for name, module in model.named_modules():
            refuse_unready(module, name)
            part, own = weakref.ref(module), vars(module)
            _, options = ACTIVATION_MODULES.get(kind := type(module), ("", ()))
            # One that the model's own code reads too may be in other layers as well.
            options = [o for o in options if type(own.get(o)) is float and o not in guards.names]
            self._constants += [(part, f"{name}.{each}".lstrip("."), each) for each in options]
            # Attributes that code reads: also such that are not there, as they would hide a method.
            read = guards.names
            if kind in guards.of_torchs:
                read = {n for n in guards.of_torchs[kind] if n in own or hasattr(kind, n)}
            read = read - INTERNAL - {*options}
            kept = {n for n in read if _is_kept(own.get(n), guards)}
            self._parts.append((part, sorted(kept)))
            self._left_out += [(part, name, each) for each in sorted(read - kept)]
            if kind in guards.of_torchs and not self.unwatched:
                self.unwatched = _unwatched(name, own, read - kept)
        self._expected, self._children = self._values()
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.devices = {p.device.type for p in self.parameters.values()}
        self._tensors: list[Tensor] = [*self.parameters.values(), *model.buffers()]
        self._states = [*map(_state, self._tensors)]
        self.learns_buffers = any(buffer.requires_grad for buffer in model.buffers())
        self.slots = Slots(model)
        self.compiled = any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        )
        values = [by_value(value) for value in self._expected if not isinstance(value, Tensor)]
        # Models that are alike by value share what was found.
        left_out = tuple(place[1:] for place in self._left_out)
        key = (
            tuple(values), left_out, _places(model), tuple(self._states), guards.key(), self.unseen,
        )  # fmt: skip
        self._cache, self._token = cache, cache.token(key)
        self._read_constants()

    def holds(self) -> bool:
        """Return whether the model is still the one that was looked at."""
        try:
            values, children = self._values()
        except AttributeError:  # a part is gone
            return False
        if len(values) != len(self._expected):
            return False
        if not all(map(is_, values, self._expected)):
            if not all(map(_same, values, self._expected)):
                return False
            self._expected = values
        return (
            children == self._children
            and not any(map(self._may_be_kept, self._left_out))
            and self._read_constants()
            and self._guards.hold()
            and [*map(_state, self._tensors)] == self._states
        )

    def _values(self) -> tuple[list[Any], list[int]]:
        """The class, attributes, tensors and hooks of every part; the addresses of its children."""
        values: list[Any] = [*map(len, GLOBAL_HOOKS)]
        children: list[int] = []
        for part, names in self._parts:
            module: Any = part()
            own = module.__dict__
            parameters, buffers, modules, *hooks = _tables(own)  # most of them empty
            values.append(type(module))
            values += map(own.get, names)
            if parameters:
                values += parameters.values()
            if buffers:
                values += buffers.values()
            if modules:
                children += map(id, modules.values())
            if any(hooks):
                values += map(len, hooks)
        return values, children

    def _may_be_kept(self, place: tuple[weakref.ref[nn.Module], str, str]) -> bool:
        """Return whether a value that may be kept now stands at a place that was left out."""
        part, _, attribute = place
        return _is_kept(vars(part()).get(attribute), self._guards)

    def _read_constants(self) -> bool:
        self.constants = {name: vars(part()).get(each) for part, name, each in self._constants}
        return all(type(value) is float for value in self.constants.values())

    def signs(self) -> Hashable:
        """The signs of the constants, which a plan depends on."""
        return tuple((value > 0) - (value < 0) for value in self.constants.values())

    def known(self, key: Hashable, find: Callable[[], T]) -> T:
        """The result of `find` for `key`, found once."""
        return self._cache.find_for(self._token, key, find)


def _is_kept(value: Any, guards: Guards) -> bool:
    """Return whether an attribute may be kept: a constant or a function, which holds no module."""
    own = isinstance(value, FunctionType) and not guards.unseen
    return own or is_plain(value) or is_torchs(value)


def _unwatched(layer: str, attributes: Mapping[str, Any], names: Set[str]) -> str:
    for name in sorted(names):
        if not name.startswith("_"):
            return (
                f"layer {layer!r} has {a_kind(attributes[name])}, {name}, which may change unseen; "
                "make it a number or a tuple"
            )
    return ""


def _same(value: Any, other: Any) -> bool:
    return value is other or (is_plain(value) and by_value(value) == by_value(other))


def _places(model: nn.Module) -> Hashable:
    """The names at which each module, parameter and buffer is found."""
    kinds = (model.named_modules, model.named_parameters, model.named_buffers)
    found = [pair for named in kinds for pair in named(remove_duplicate=False)]
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
