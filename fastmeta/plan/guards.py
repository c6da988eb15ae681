"""Values that a model's own Python reads beside tensors: while they stay, so does what was traced.

Everything that the Python of a traced `forward` can read is found by name, in its bytecode, and
becomes a guard: a place, and the object that stood there. Where it reads something that no guard
can watch (a list, a settings object, torch's modes), `Guards.unseen` says what, and the module
itself is run.
"""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Callable, Hashable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.network.provenance import MODULES, by_value, is_of_arguments, is_plain, is_torchs

ENTRIES = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
"""Methods that run before a `forward`, or find what it reads."""
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of a module that torch never binds anew."""

_inside = attrgetter("__code__", "__defaults__", "__kwdefaults__")


class Guards:
    """Everything that the Python of a model's modules reads, found once."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {"forward", *ENTRIES[:2]}
        """The names of attributes that its code reads."""
        self.of_torchs: dict[type, list[str]] = {}
        """The names that each class of torch's reads."""
        self.unseen = ""
        """The first thing that it reads and no guard can watch; empty where there is none."""
        self.writes = ""
        """The first attribute or global that it binds; empty where there is none."""
        self._owners: dict[types.ModuleType | types.FunctionType, None] = {}
        self._places: dict[tuple[int, str], tuple[Callable[[str], Any], str]] = {}
        self._insides: dict[types.FunctionType, None] = {}
        self._cells: dict[int, types.CellType] = {}
        self._kinds: list[type] = []
        self._read([*model.modules()])
        del self._owners
        if self.unseen:  # what was found may hold the model, which must not hold itself
            self._places, self._insides, self._cells = {}, {}, {}
        self._expected = self._values()

    def hold(self) -> bool:
        """Return whether every value is still the same."""
        try:
            return all(map(is_, self._values(), self._expected))
        except ValueError:  # an empty cell
            return False

    def key(self) -> Hashable:
        """The values, by value where they have one."""
        return tuple(map(by_value, self._expected))

    def _values(self) -> list[Any]:
        values = [find(name) for find, name in self._places.values()]
        values += chain.from_iterable(map(_inside, self._insides))
        values += [kind.__mro__ for kind in self._kinds]
        return values + [cell.cell_contents for cell in self._cells.values()]

    def _read(self, parts: list[nn.Module]) -> None:
        kinds = [*dict.fromkeys(map(type, parts))]
        self._kinds = [kind for kind in kinds if not is_torchs(kind)]
        for name in ENTRIES[:3]:
            self._watch(nn.Module, name)
        for kind in kinds:
            for name in ENTRIES:
                if hasattr(kind, name) and not is_torchs(getattr(kind, name)):
                    self._refuse(f"{kind.__name__} has a {name} of its own")
                if kind in self._kinds or name == "__call__":
                    self._watch(kind, name)
            if is_torchs(kind):
                self._torchs_own(kind)
        size = -1
        while size < (found := len(self._owners) + len(self.names)):
            size = found
            for name in sorted(self.names):
                if hasattr(Tensor, name):  # as a method
                    self._watch(Tensor, name)
                for owner in (*self._owners, *parts):
                    if name in vars(owner):
                        self._value(name, vars(owner)[name])
                        if not isinstance(owner, nn.Module):  # which the snapshot watches
                            self._watch(owner, name)
                    elif name in dir(type(owner)) and isinstance(owner, types.ModuleType):
                        self._refuse(f"its forward reads {name} of a module, a property")
                for kind in self._kinds:
                    self._member(name, kind)
                if not any(hasattr(each, name) for each in (Tensor, *parts, *self._owners)):
                    self._refuse(f"its forward reads {name}, which was not found")
            for owner in [*self._owners]:
                if isinstance(owner, types.FunctionType):
                    self._function(owner)

    def _torchs_own(self, kind: type) -> None:
        """Watch what a layer of torch's runs: its forward, and the functions that this calls."""
        own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
        names = self.of_torchs[kind] = ["forward"]
        for name in names:
            for base in own:
                if isinstance(value := vars(base).get(name), types.FunctionType):
                    self._watch(base, name)
                    self._check_torchs(base, name)
                    names += _reads(value.__code__)[1].difference(names)

    def _member(self, name: str, kind: type) -> None:
        """Read what a class holds under a name; its bases' too where that calls `super()`."""
        for base in kind.__mro__:
            if is_torchs(base):
                return
            self._watch(base, name)
            if name in vars(base):
                value = vars(base)[name]
                if isinstance(value, (staticmethod, classmethod, property)):
                    value = value.fget if isinstance(value, property) else value.__func__
                self._value(name, value)
                if "__class__" not in getattr(getattr(value, "__code__", None), "co_freevars", ()):
                    return

    def _function(self, function: types.FunctionType) -> None:
        self._insides[function] = None
        code, keywords = function.__code__, function.__kwdefaults__ or {}
        if not all(map(is_plain, (function.__defaults__, *keywords.values()))):
            self._refuse(f"a default argument of {function.__name__} may change unseen")
        for name in keywords:
            self._watch(keywords, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._cells[id(cell)] = cell
                self._value(name, cell.cell_contents)
        bound = _binds(code)
        self.writes = self.writes or (bound and f"{function.__qualname__} writes {bound}")
        loaded, names = _reads(code)
        for name in loaded:
            self._watch(function.__globals__, name)
            self._value(name, function.__globals__.get(name, vars(builtins).get(name)))
        for name in names - loaded:
            if name in INTERNAL or (name.startswith("__") and name.endswith("__")):
                self._refuse(f"its forward reads {name}, through which anything can be read")
            self.names.add(name)

    def _watch(self, owner: Any, name: str) -> None:
        """Guard an entry of a dictionary, or that there is none; a function's inside too."""
        if (id(owner), name) in self._places:
            return
        find = (owner if isinstance(owner, dict) else vars(owner)).get
        self._places[id(owner), name] = find, name
        if isinstance(value := find(name), types.FunctionType):
            self._insides[value] = None
            if is_torchs(value):  # which finds by name what it calls to compute
                for called in _reads(value.__code__)[1]:
                    for place in (F, torch):
                        if called in vars(place):
                            self._watch(place, called)
                            self._check_torchs(place, called)

    def _check_torchs(self, owner: Any, name: str) -> None:
        """Refuse a function in the place of one that torch's layers call: it may compute by any."""
        value = vars(owner)[name]
        if isinstance(value, types.FunctionType) and not is_torchs(value):
            self._refuse(f"{owner.__name__}.{name} was replaced")

    def _refuse(self, reason: str) -> None:
        self.unseen = self.unseen or reason

    def _value(self, name: str, value: Any) -> None:
        """Accept a value that the code reads, and read on in a function of the user's."""
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in MODULES:
                self._refuse(f"its forward reads the module {value.__name__}")
            self._owners[value] = None
        elif is_torchs(value):
            if not is_of_arguments(value):
                self._refuse(f"its forward calls {name}, whose answer may change unseen")
        elif isinstance(value, types.FunctionType):
            self._owners[value] = None
        elif not is_plain(value):
            kind = type(value).__name__
            self._refuse(f"its forward reads {name} ({kind}) which may change unseen")


@functools.lru_cache(maxsize=1024)
def _reads(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that the code and functions inside it load, and these with attributes' names."""
    steps = [step for step in dis.get_instructions(code) if step.opcode in dis.hasname]
    loaded = {s.argval for s in steps if not s.opname.endswith(("_ATTR", "_METHOD"))}
    inner = [_reads(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    names = {step.argval for step in steps}.union(*[names for _, names in inner])
    return loaded.union(*[loaded for loaded, _ in inner]), names


@functools.lru_cache(maxsize=1024)
def _binds(code: types.CodeType) -> str:
    """The name of the first attribute or global that the code binds; empty where none."""
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR"):
            return step.argval
    return next(filter(None, map(_binds, filter(_is_code, code.co_consts))), "")


def _is_code(value: Any) -> bool:
    return isinstance(value, types.CodeType)
