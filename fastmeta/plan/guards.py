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
from itertools import product
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.network.provenance import MODULES, by_value, is_of_arguments, is_plain, is_torchs

ENTRIES = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
"""Methods that run before a `forward`, or find what it reads."""
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of a module that torch never binds anew."""
INSIDE = ("__code__", "__defaults__", "__kwdefaults__")
"""Attributes of a function that change what it computes."""


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
        self._attributes: dict[tuple[int, str], tuple[Any, str]] = {}
        self._read([*model.modules()])
        del self._owners
        if self.unseen:  # what was found may hold the model, which must not hold itself
            self._places, self._attributes = {}, {}
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
        return values + [getattr(owner, name) for owner, name in self._attributes.values()]

    def _read(self, parts: list[nn.Module]) -> None:
        kinds = [*dict.fromkeys(map(type, parts))]
        own = [kind for kind in kinds if not is_torchs(kind)]
        for kind in own:
            self._attribute(kind, "__mro__")
        for name in ENTRIES[:3]:
            self._watch(nn.Module, name)
        for kind in kinds:
            for name in ENTRIES:
                if hasattr(kind, name) and not is_torchs(getattr(kind, name)):
                    self._refuse(f"{kind.__name__} has a {name} of its own")
                if kind in own or name == "__call__":
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
                for kind in own:
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
                    self._watch(base, name, torchs=True)
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
        self._attribute(function, *INSIDE)
        code, keywords = function.__code__, function.__kwdefaults__ or {}
        if not all(map(is_plain, (function.__defaults__, *keywords.values()))):
            self._refuse(f"a default argument of {function.__name__} may change unseen")
        for name in keywords:
            self._watch(keywords, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._attribute(cell, "cell_contents")
                self._value(name, cell.cell_contents)
        loaded, names, bound = _reads(code)
        self.writes = self.writes or (bound and f"{function.__qualname__} writes {bound}")
        for name in loaded:
            self._watch(function.__globals__, name)
            self._value(name, function.__globals__.get(name, vars(builtins).get(name)))
        for name in names - loaded:
            if name in INTERNAL or (name.startswith("__") and name.endswith("__")):
                self._refuse(f"its forward reads {name}, through which anything can be read")
            self.names.add(name)

    def _watch(self, owner: Any, name: str, torchs: bool = False) -> None:
        """Guard an entry of a dictionary, or that there is none; a function's inside too.

        A user's function in the place of one that torch's layers call may compute by anything.
        """
        find = (owner if isinstance(owner, dict) else vars(owner)).get
        if not isinstance(value := find(name), types.FunctionType):
            self._places[id(owner), name] = find, name
            return
        if torchs and not is_torchs(value):
            self._refuse(f"torch's {name} was replaced")
        if (id(owner), name) not in self._places:
            self._places[id(owner), name] = find, name
            self._attribute(value, *INSIDE)
            if is_torchs(value):  # which finds by name what it calls to compute
                for place, called in product((F, torch), _reads(value.__code__)[1]):
                    if called in vars(place):
                        self._watch(place, called, torchs=True)

    def _attribute(self, owner: Any, *names: str) -> None:
        self._attributes.update({(id(owner), name): (owner, name) for name in names})

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
def _reads(code: types.CodeType) -> tuple[set[str], set[str], str]:
    """The names that code loads, these with attributes' names, and the first name that it binds."""
    loaded, names, bound = set[str](), set[str](), ""
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasname:
            names.add(step.argval)
            if not step.opname.endswith(("_ATTR", "_METHOD")):
                loaded.add(step.argval)
            if step.opname in ("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR"):
                bound = bound or step.argval
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            inner = _reads(each)
            loaded, names, bound = loaded | inner[0], names | inner[1], bound or inner[2]
    return loaded, names, bound
