"""Values that a model's own Python reads beside tensors: while they stay, so does what was traced.

A traced `forward` is only as good as the Python that it was traced from. Everything which that
Python can read is found by name, in its bytecode, and becomes a guard: a place, and the object that
stood there. Where it reads something that no guard can watch (a list, a settings object, a question
to torch that no tensor answers), `Guards.unseen` says what, and the module itself is run.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.plan import vocabulary as words

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MODULES = ("torch", "math", "operator", "typing")
_BUILTINS = frozenset([
    abs, all, any, bool, enumerate, float, int, isinstance, iter, len, list, map, max, min, next,
    print, range, reversed, round, sorted, str, sum, super, tuple, zip,
])  # fmt: skip
ENTRIES = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
"""Methods that run before a `forward`, or find what it reads."""
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of a module that torch never binds anew."""

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
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
        self._modules: dict[types.ModuleType, None] = {}
        self._functions: dict[types.FunctionType, None] = {}
        self._places: dict[tuple[int, str], tuple[Callable[[str], Any], str]] = {}
        self._insides: dict[types.FunctionType, None] = {}
        self._cells: dict[int, types.CellType] = {}
        self._kinds: list[type] = []
        self._read([*model.modules()])
        del self._modules, self._functions
        if self.unseen:  # what was found may hold the model, which must not hold itself
            self._places, self._insides, self._cells = {}, {}, {}
        self._finds = [*self._places.values()]
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
        values = [find(name) for find, name in self._finds]
        values += chain.from_iterable(map(_inside, self._insides))
        values += [kind.__mro__ for kind in self._kinds]
        return values + [cell.cell_contents for cell in self._cells.values()]

    def _read(self, parts: list[nn.Module]) -> None:
        kinds = [*dict.fromkeys(map(type, parts))]
        # `vars` of a class is another object each time.
        held: dict[type, Mapping[str, Any]] = {
            base: vars(base) for kind in (*kinds, Tensor) for base in kind.__mro__
        }
        self._kinds = [kind for kind in kinds if not is_torchs(kind)]
        for kind in kinds:
            for name in ENTRIES:
                if hasattr(kind, name) and not is_torchs(getattr(kind, name)):
                    self._refuse(f"{kind.__name__} has a {name} of its own")
                if kind in self._kinds or name == "__call__":
                    self._watch(held[kind], name)
            if is_torchs(kind):
                self._torchs_own(kind, held)
        for name in ENTRIES[:3]:
            self._watch(held[nn.Module], name)
        size = -1
        while size < (found := len(self._modules) + len(self._functions) + len(self.names)):
            size = found
            for name in sorted(self.names):
                if name in words.CALLED:  # as a method
                    self._watch(held[Tensor], name)
                known = any(hasattr(kind, name) for kind in (Tensor, nn.Module, *kinds))
                for owner in (*self._modules, *self._functions):
                    if name in vars(owner):
                        known = True
                        self._watch(vars(owner), name)
                        self._value(name, vars(owner)[name])
                    elif hasattr(type(owner), name) and not hasattr(types.ModuleType, name):
                        self._refuse(f"its forward reads {name} of a module, a property")
                for part in parts:  # whose attributes the snapshot watches
                    known = known or hasattr(part, name)
                    if name in vars(part) and name not in INTERNAL:
                        self._value(name, vars(part)[name])
                for kind in self._kinds:
                    self._member(name, kind, held)
                if not known:
                    self._refuse(f"its forward reads {name}, which was not found")
            for function in [*self._functions]:
                self._function(function)

    def _torchs_own(self, kind: type, held: Mapping[type, Mapping[str, Any]]) -> None:
        """Watch what a layer of torch's runs: its forward, and the functions that this calls."""
        own = [held[base] for base in kind.__mro__ if base not in nn.Module.__mro__]
        names = self.of_torchs[kind] = ["forward"]
        for name in names:
            for place in own:
                if isinstance(value := place.get(name), types.FunctionType):
                    self._watch(place, name)
                    names += _names(value.__code__).difference(names)

    def _member(self, name: str, kind: type, held: Mapping[type, Mapping[str, Any]]) -> None:
        """Read what a class holds under a name; its bases' too where that calls `super()`."""
        for base in kind.__mro__:
            if base is object or is_torchs(base):
                return
            self._watch(held[base], name)
            value = held[base].get(name, base)
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if value is not base:
                self._value(name, value)
                code = getattr(value, "__code__", None)
                if code is None or "__class__" not in code.co_freevars:
                    return

    def _function(self, function: types.FunctionType) -> None:
        self._insides[function] = None
        code, place, keywords = function.__code__, function.__globals__, function.__kwdefaults__
        if not all(map(is_plain, (function.__defaults__, *(keywords or {}).values()))):
            self._refuse(f"a default argument of {function.__name__} may change unseen")
        for name in keywords or {}:
            self._watch(keywords or {}, name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._cells[id(cell)] = cell
                self._value(name, cell.cell_contents)
        loaded = _loaded(code)
        for name in loaded:
            self._watch(place, name)
            self._value(name, place.get(name, vars(builtins).get(name)))
        for name in _names(code) - loaded:
            if name in INTERNAL or (name.startswith("__") and name.endswith("__")):
                self._refuse(f"its forward reads {name}, through which anything can be read")
            self.names.add(name)

    def _watch(self, place: Mapping[str, Any], name: str) -> None:
        """Guard an entry of a dictionary, or that there is none; a function's inside too."""
        if (id(place), name) in self._places:
            return
        self._places[id(place), name] = place.get, name
        if isinstance(value := place.get(name), types.FunctionType):
            self._insides[value] = None
            # What torch's own calls to compute, it finds by name.
            for called in words.CALLED & _names(value.__code__) if is_torchs(value) else ():
                self._watch(vars(F), called)
                self._watch(vars(torch), called)

    def _refuse(self, reason: str) -> None:
        self.unseen = self.unseen or reason

    def _value(self, name: str, value: Any) -> None:
        """Accept a value that the code reads, and read on in a function of the user's."""
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _MODULES:
                self._refuse(f"its forward reads the module {value.__name__}")
            self._modules[value] = None
        elif is_torchs(value):
            if not is_of_arguments(value):
                self._refuse(f"its forward calls {name}, whose answer may change unseen")
        elif isinstance(value, types.FunctionType):
            self._functions[value] = None
        elif not is_plain(value):
            self._refuse(
                f"its forward reads {name} ({type(value).__name__}) which may change unseen"
            )


def is_plain(value: Any) -> bool:
    """Return whether a value is a constant, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)


def by_value(value: Any) -> Hashable:
    """A key that equal constants share (but not 1, 1.0 and True), and no other objects."""
    if is_plain(value):
        return type(value), repr(value)
    return value if isinstance(value, Hashable) else id(value)


def is_of_arguments(value: Any) -> bool:
    """Return whether a function's result depends on its arguments alone; classes' does."""
    if value in (operator.attrgetter, operator.methodcaller):
        return False  # of any attribute
    return not isinstance(value, _FUNCTIONS) or value in _of_arguments()


@functools.cache
def _of_arguments() -> frozenset[Any]:
    """The functions whose result depends on their arguments alone, in one process."""
    settled = (torch.jit.is_scripting, torch.jit.is_tracing, torch.compiler.is_compiling)
    computing = (value for module in (math, operator) for value in vars(module).values())
    return frozenset([
        *torch.overrides.get_testing_overrides(), *words.ACTIVATION_FUNCTIONS, *words.FUNCTIONS,
        *filter(callable, computing), *settled, *_BUILTINS,
    ])  # fmt: skip


def is_torchs(value: Any) -> bool:
    """Return whether it is a function or a class of torch, or of a module that only computes."""
    if isinstance(value, types.BuiltinFunctionType):  # bound to an object it may read that
        owner = value.__self__
        if not isinstance(owner, types.ModuleType):
            return owner is None or is_torchs(owner)
        home = owner.__name__
    elif isinstance(value, types.FunctionType):
        home = value.__globals__.get("__name__", "")  # `wraps` copies __module__
    elif isinstance(value, type):
        home = value.__module__
    else:
        return isinstance(value, (types.MethodDescriptorType, types.WrapperDescriptorType))
    return home.split(".")[0] in (*_MODULES, "_operator", "builtins")


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in the code, and in functions inside it."""
    return {name for inner in _codes(code) for name in inner.co_names}


@functools.lru_cache(maxsize=1024)
def _loaded(code: types.CodeType) -> set[str]:
    """Those of them that are not of attributes alone."""
    return {
        step.argval
        for inner in _codes(code)
        for step in dis.get_instructions(inner)
        if step.opcode in dis.hasname and not step.opname.endswith(("_ATTR", "_METHOD"))
    }


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of every function inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
