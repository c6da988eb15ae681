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
_LEFT_OUT = object()
"""In the place of a value that may hold the model, which would then live for ever."""
_state = attrgetter("shape", "dtype", "requires_grad", "device")


class Snapshot:
    """The modules, tensors and guards of a model, and what follows from them alone."""

    def __init__(self, model: nn.Module, cache: Cache) -> None:
        self._guards = guards = Guards(model)
        self.unseen = guards.unseen
        """The first thing that its Python reads and no guard can watch; empty if none."""
        self.writes = guards.writes
        """The first thing that its Python writes; empty if none."""
        # The model's own life must not depend on what is kept of it.
        self._parts: list[tuple[weakref.ref[nn.Module], list[str], list[str]]] = []
        """Each module, its attributes that code reads, and those whose values may not be kept."""
        self._constants: list[tuple[weakref.ref[nn.Module], str, str]] = []
        self.constants: dict[str, Any] = {}
        """Options of activations by name, as they are now: arguments of a step, not of its plan."""
        for name, module in model.named_modules():
            refuse_unready(module, name)
            part, own, kind = weakref.ref(module), vars(module), type(module)
            _, options = ACTIVATION_MODULES.get(kind, ("", ()))
            # One that the model's own code reads too may be in other layers as well.
            options = [o for o in options if type(own.get(o)) is float and o not in guards.names]
            self._constants += [(part, f"{name}.{each}".lstrip("."), each) for each in options]
            # Attributes that code reads: also such that are not there, as they would hide a method.
            read = guards.names
            if kind in guards.of_torchs:
                read = {n for n in guards.of_torchs[kind] if n in own or hasattr(kind, n)}
            read = read - INTERNAL - {*options}
            kept = {n for n in read if self._kept(own.get(n)) is not _LEFT_OUT}
            self._parts.append((part, sorted(kept), sorted(read - kept)))
            if kind in guards.of_torchs:
                self.unseen = self.unseen or _unwatched(name, own, read - kept)
        self._expected = self._values()
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.devices = {p.device.type for p in self.parameters.values()}
        self._tensors: list[Tensor] = [*self.parameters.values(), *model.buffers()]
        self._states = [*map(_state, self._tensors)]
        self.learns_buffers = any(buffer.requires_grad for buffer in model.buffers())
        self.slots = Slots(model)
        self.compiled = any(
            m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
        )
        references = (Tensor, weakref.ref)
        values = [by_value(v) for v in self._expected if not isinstance(v, references)]
        # Models that are alike by value share what was found.
        left_out = tuple(tuple(names) for _, _, names in self._parts)
        key = (
            tuple(values), left_out, _places(model), tuple(self._states), guards.key(), self.unseen,
        )  # fmt: skip
        self.cache = cache
        self._token = cache.find(key, object)
        self._read_constants()

    def holds(self) -> bool:
        """Return whether the model is still the one that was looked at."""
        try:
            values = self._values()
        except AttributeError:  # a part is gone
            return False
        if len(values) != len(self._expected):
            return False
        if not all(map(is_, values, self._expected)):
            if not all(map(_same, values, self._expected)):
                return False
            self._expected = values
        return (
            self._read_constants()
            and self._guards.hold()
            and [*map(_state, self._tensors)] == self._states
        )

    def _values(self) -> list[Any]:
        """The class, attributes, tensors, children and hooks of every part."""
        values: list[Any] = [*map(len, GLOBAL_HOOKS)]
        for part, kept, left_out in self._parts:
            module: Any = part()
            own = module.__dict__
            parameters, buffers, modules, *hooks = _tables(own)  # most of them empty
            values.append(type(module))
            values += map(own.get, kept)
            if left_out:
                values += map(self._kept, map(own.get, left_out))
            if parameters:
                values += parameters.values()
            if buffers:
                values += buffers.values()
            if modules:  # a module has one such reference while it lives
                values += map(_reference, modules.values())
            if any(hooks):
                values += map(len, hooks)
        return values

    def _kept(self, value: Any) -> Any:
        """The value where it holds no module: a constant or a function."""
        own = isinstance(value, FunctionType) and not self._guards.unseen
        return value if own or is_plain(value) or is_torchs(value) else _LEFT_OUT

    def _read_constants(self) -> bool:
        self.constants = {name: vars(part()).get(each) for part, name, each in self._constants}
        return all(type(value) is float for value in self.constants.values())

    def signs(self) -> Hashable:
        """The signs of the constants, which a plan depends on."""
        return tuple((value > 0) - (value < 0) for value in self.constants.values())

    def known(self, key: Hashable, find: Callable[[], T]) -> T:
        """The result of `find` for `key`, found once."""
        return self.cache.find((self._token, key), find)


def _reference(module: nn.Module | None) -> weakref.ref[nn.Module] | None:
    return None if module is None else weakref.ref(module)


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


_snapshots: weakref.WeakKeyDictionary[nn.Module, Snapshot] = weakref.WeakKeyDictionary()


def snapshot(model: nn.Module) -> Snapshot:
    """The model's snapshot, taken anew where it no longer holds; one thread a model at a time."""
    kept = _snapshots.get(model)
    if kept is not None and kept.holds():
        return kept
    taken = _snapshots[model] = Snapshot(model, Cache() if kept is None else kept.cache)
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
