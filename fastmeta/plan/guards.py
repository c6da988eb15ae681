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
import types
from collections.abc import Hashable, Iterator, Mapping
from operator import attrgetter, is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastmeta.plan import vocabulary as words

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MODULES = ("torch", "math", "operator", "typing")
_BUILTINS = frozenset([
    abs, all, any, bool, enumerate, float, int, isinstance, iter, len, list, map, max, min, next,
    print, range, reversed, round, sorted, str, sum, super, tuple, zip,
])  # fmt: skip
ENTRIES = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
"""Methods that run before a `forward`, or find what it reads."""
_SETTLED = (torch.jit.is_scripting, torch.jit.is_tracing, torch.compiler.is_compiling)
"""Questions that have one answer wherever a step can run."""
_METHODS = {*words.ACTIVATION_METHODS, *words.METHODS, *words.PASSING_METHODS}

GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)

_parts = attrgetter("__code__", "__defaults__", "__kwdefaults__")


class Guards:
    """Everything that the Python of a model's modules reads, found once."""

    def __init__(self, model: nn.Module) -> None:
        self.names: set[str] = set()
        """The names of attributes that its code reads."""
        self.unseen = ""
        """The first thing that it reads and no guard can watch; empty where there is none."""
        self._functions: list[types.FunctionType] = []
        self._cells: list[types.CellType] = []
        self._places: dict[tuple[int, str], Mapping[str, Any]] = {}
        _Reader(model, self).read()
        if self.unseen:
            # What was found may hold the model, which must not hold itself.
            self._functions, self._cells, self._places = [], [], {}
        self._finds = [(place.get, name) for (_, name), place in self._places.items()]
        self._expected = self._values()

    def function(self, function: types.FunctionType) -> None:
        """Watch a function's code and defaults."""
        self._functions.append(function)
        if function.__kwdefaults__:
            for name in function.__kwdefaults__:
                self.item(function.__kwdefaults__, name)

    def cell(self, cell: types.CellType) -> None:
        """Watch a variable of an enclosing function."""
        self._cells.append(cell)

    def item(self, place: Mapping[str, Any], name: str) -> None:
        """Watch an entry of a dictionary, or that there is none."""
        self._places[id(place), name] = place

    def refuse(self, reason: str) -> None:
        """Say what can't be watched."""
        self.unseen = self.unseen or reason

    def hold(self) -> bool:
        """Tell whether every value is still the same."""
        try:
            return all(map(is_, self._values(), self._expected))
        except ValueError:  # an empty cell
            return False

    def key(self) -> Hashable:
        """The values, by value where they have one."""
        return tuple(map(by_value, self._expected))

    def _values(self) -> list[Any]:
        values = [find(name) for find, name in self._finds]
        for function in self._functions:
            values += _parts(function)
        values += [cell.cell_contents for cell in self._cells]
        return values


def is_plain(value: Any) -> bool:
    """Tell whether a value is a constant, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)


def by_value(value: Any) -> Hashable:
    """A key that equal constants share (but not 1, 1.0 and True), and no other objects."""
    if is_plain(value):
        return type(value), repr(value)
    return value if isinstance(value, Hashable) else id(value)


class _Reader:
    """One pass over the functions that a model's forward may run."""

    def __init__(self, model: nn.Module, guards: Guards) -> None:
        self._guards = guards
        self._parts = [*model.modules()]
        kinds = dict.fromkeys(map(type, self._parts))
        self._own = [kind for kind in kinds if not is_torchs(kind)]
        self._modules: list[types.ModuleType] = []
        self._attributes: dict[str, str] = {}
        """The attributes that the code reads, by the function that reads them first."""
        self._waiting: list[types.FunctionType] = []
        self._of_classes: dict[type, Mapping[str, Any]] = {}

    def read(self) -> None:
        for kind in dict.fromkeys(map(type, self._parts)):
            for name in ENTRIES:
                if hasattr(kind, name) and not is_torchs(getattr(kind, name)):
                    self._guards.refuse(f"{kind.__name__} has a {name} of its own")
            if is_torchs(kind):
                self._guards.item(self._held(kind), "forward")
            else:
                self._members(kind, "forward")
        for name in ENTRIES[:3]:
            self._guards.item(self._held(nn.Module), name)
        for module in (F, torch):  # what layers of torch's call
            for name in words.CALLED & vars(module).keys():
                self._guards.item(vars(module), name)
        seen: set[int] = set()
        resolved: set[tuple[int, str]] = set()
        while self._waiting:
            function = self._waiting.pop()
            if id(function) not in seen:
                seen.add(id(function))
                self._function(function)
            if not self._waiting:
                self._resolve(resolved)
        self._guards.names.update(self._attributes, ("forward", *ENTRIES[:2]))

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self._guards.function(function)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if not all(map(is_plain, defaults)):
            self._guards.refuse(f"a default argument of {function.__name__} may change unseen")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                self._guards.cell(cell)
                self._value(name, cell.cell_contents)
        loaded = _loaded(code)
        for name in loaded:
            if name in function.__globals__:
                self._guards.item(function.__globals__, name)
                self._value(name, function.__globals__[name])
            elif name in vars(builtins):
                self._guards.item(function.__globals__, name)
                value = vars(builtins)[name]
                is_error = isinstance(value, type) and issubclass(value, BaseException)
                if value not in _BUILTINS and not is_error:
                    self._guards.refuse(f"its forward calls {name}")
            else:
                self._guards.refuse(f"its forward reads {name}, which was not found")
        for name in _names(code) - loaded:
            self._attributes.setdefault(name, function.__name__)

    def _resolve(self, resolved: set[tuple[int, str]]) -> None:
        """Look every attribute up wherever it may be found: in modules, classes and parts."""
        for name in sorted(self._attributes):
            known = hasattr(Tensor, name) or hasattr(nn.Module, name)
            if name in _METHODS:
                self._guards.item(self._held(Tensor), name)
            for module in [*self._modules]:
                known |= name in vars(module)
                if name in vars(module) and (id(module), name) not in resolved:
                    resolved.add((id(module), name))
                    self._guards.item(vars(module), name)
                    self._value(name, vars(module)[name])
            for kind in self._own:
                known |= hasattr(kind, name)
                if (id(kind), name) not in resolved:
                    resolved.add((id(kind), name))
                    self._members(kind, name)
            for part in self._parts:
                known |= self._of_part(part, name, resolved)
            if not known:
                self._guards.refuse(f"its forward reads {name}, which was not found")

    def _of_part(self, part: nn.Module, name: str, resolved: set[tuple[int, str]]) -> bool:
        """Read an attribute of a module; the snapshot watches that it stays."""
        own = vars(part)
        if any(name in own[place] for place in ("_parameters", "_buffers", "_modules")):
            return True
        if name not in own or name in INTERNAL:
            return name in own
        if (id(part), name) not in resolved:
            resolved.add((id(part), name))
            self._value(name, own[name])
        return True

    def _members(self, kind: type, name: str) -> None:
        """Read what a class holds under a name; its bases' too where that calls `super()`."""
        for base in kind.__mro__:
            if base is object or is_torchs(base):
                return
            self._guards.item(self._held(base), name)
            if name not in vars(base):
                continue
            value = vars(base)[name]
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            self._value(name, value)
            code = getattr(value, "__code__", None)
            if code is None or "__class__" not in code.co_freevars:
                return

    def _held(self, kind: type) -> Mapping[str, Any]:
        """A class's own attributes; `vars` would make another view of them each time."""
        return self._of_classes.setdefault(kind, vars(kind))

    def _value(self, name: str, value: Any) -> None:
        """Accept a value that the code reads, and read on in a function of the user's."""
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _MODULES:
                self._guards.refuse(f"its forward reads the module {value.__name__}")
            if value not in self._modules:
                self._modules.append(value)
        elif is_torchs(value):
            if _is_question(value):
                self._guards.refuse(f"its forward asks {name}(), whose answer may change unseen")
        elif isinstance(value, types.FunctionType):
            self._waiting.append(value)
        elif not is_plain(value):
            kind = type(value).__name__
            article = "an" if kind[:1].lower() in "aeiou" else "a"
            self._guards.refuse(
                f"its forward reads {name}, {article} {kind}, which may change unseen"
            )


INTERNAL = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of a module that torch never binds anew."""


@functools.cache
def _of_tensors() -> frozenset[Any]:
    """The functions of torch whose result depends on their arguments alone."""
    known = torch.overrides.get_testing_overrides()
    return frozenset([*known, *words.ACTIVATION_FUNCTIONS, *words.FUNCTIONS, *_SETTLED])


def _is_question(value: Any) -> bool:
    """Tell whether it is a function of torch that reads torch's own state, or makes tensors."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return False
    home = getattr(value, "__module__", None) or ""
    return not home.startswith(("math", "_operator", "builtins")) and value not in _of_tensors()


def is_torchs(value: Any) -> bool:
    """Tell whether it is a function or a class of torch, or of a module that only computes."""
    if isinstance(value, types.FunctionType):
        home = value.__globals__.get("__name__", "")  # `wraps` copies __module__
    elif isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__  # a module or class, or none; bound to another object it reads that
        if owner is None:
            return True
        if not isinstance(owner, (types.ModuleType, type)):
            return False
        home = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    elif isinstance(value, type):
        home = value.__module__
    else:
        return isinstance(value, (types.MethodDescriptorType, types.WrapperDescriptorType))
    return home.split(".")[0] in (*_MODULES, "_operator", "builtins")


def _names(code: types.CodeType) -> set[str]:
    """All globals and attributes that the code, or a function inside it, names."""
    return {name for inner in _codes(code) for name in inner.co_names}


def _loaded(code: types.CodeType) -> set[str]:
    """Those of them that are not named as attributes alone."""
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
