"""What a model's Python reads beside tensors, so that a plan is never older than that.

A plan that computes in the module's stead is only as good as the `forward` it was read from. Plain
values and functions that a `forward` reads are watched; where it reads anything else, or names what
can't be found, nothing can watch it.
"""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_MODULES = ("torch", "math", "operator", "typing")
_BUILTINS = frozenset([
    abs, all, any, bool, enumerate, float, int, isinstance, iter, len, list, map, max, min, next,
    print, range, reversed, round, sorted, str, sum, super, tuple, zip,
])  # fmt: skip
_ENTRIES = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__iter__", "__getitem__")
"""What runs before a `forward`, or finds what it reads."""


GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Cell:
    """A variable of an enclosing function, as a mapping."""

    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def get(self, _: str) -> Any:
        return self._cell.cell_contents


class Watch(NamedTuple):
    """A value that a `forward` reads, and where it reads it."""

    place: Mapping[str, Any] | Cell
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
        kind = type(module)
        for name in _ENTRIES:
            if hasattr(kind, name) and not is_torchs(getattr(kind, name)):
                raise Unpinned(f"{kind.__name__} has a {name} of its own")
        defining = next(base for base in kind.__mro__ if "forward" in vars(base))
        seen = [Watch(vars(defining), "forward", vars(defining)["forward"])]
        if not is_torchs(kind.forward):
            seen += _Reading(model, module).member("forward")
        found.update(((id(watch.place), watch.name), watch) for watch in seen)
    return list(found.values())


class _Reading:
    """One module's forward, and the functions that it calls."""

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self._model = model
        self._module = module
        self._seen: set[int] = set()

    def function(self, function: types.FunctionType) -> Iterator[Watch]:
        code = function.__code__
        if id(code) in self._seen:
            return
        self._seen.add(id(code))
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if not all(isinstance(value, _PLAIN) or _is_plain_tuple(value) for value in defaults):
            raise Unpinned(f"a default argument of {function.__name__} may change unseen")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                yield from self._value(Cell(cell), name, cell.cell_contents)
        names, loaded = _names(code), _loaded(code)
        modules = _modules(function, names)
        for name in names:
            known = self._of_parts(name) or any(name in vars(module) for module in modules)
            if name not in loaded:  # an attribute
                pass
            elif name in function.__globals__:
                known = True
                yield from self._value(function.__globals__, name, function.__globals__[name])
            elif name in vars(builtins):
                value = vars(builtins)[name]
                if value not in _BUILTINS and not _is_exception(value):
                    raise Unpinned(f"its forward calls {name}")
                known = True
            for watch in self.member(name):
                known = True
                yield watch
            if not known and not hasattr(Tensor, name):
                raise Unpinned(f"its forward reads {name}, which was not found")
        for module in modules:  # whose functions may be replaced
            for name in names & vars(module).keys():
                yield from self._value(vars(module), name, vars(module)[name])

    def member(self, name: str) -> Iterator[Watch]:
        """What methods, properties and constants of that name of the module read, and themselves.

        Of all its classes, because `super()` goes on to the next.
        """
        own = vars(self._module)
        if name in own:
            yield from self._value(own, name, own[name])
        for kind in type(self._module).__mro__:
            if name not in vars(kind) or is_torchs(kind) or kind is object:
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

    def _of_parts(self, name: str) -> bool:
        """Whether it is a part or a plain attribute of the model's modules, which are looked at."""
        known = hasattr(nn.Module, name)
        for module in self._model.modules():
            parts = (module._parameters, module._buffers, module._modules)
            if any(name in part for part in parts):
                known = True
            if name in vars(module) and name not in _OF_MODULES:
                if not isinstance(vars(module)[name], _PLAIN) and module is not self._module:
                    raise Unpinned(f"its forward reads {name} of a part, which may change unseen")
                known = True
        return known

    def _value(self, place: Mapping[str, Any] | Cell, name: str, value: Any) -> Iterator[Watch]:
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in _MODULES:
                raise Unpinned(f"its forward reads the module {value.__name__}")
            yield Watch(place, name, value)
        elif isinstance(value, _PLAIN) or _is_plain_tuple(value) or is_torchs(value):
            yield Watch(place, name, value)
        elif isinstance(value, types.FunctionType):
            yield Watch(place, name, value)
            yield from self.function(value)
        else:
            raise Unpinned(
                f"its forward reads {name}, a {type(value).__name__}, which may change unseen"
            )


_OF_MODULES = frozenset(vars(nn.Module()))


def _modules(function: types.FunctionType, names: set[str]) -> list[types.ModuleType]:
    """The modules that it names, and those that it names within them."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    found = [value for value in cells if isinstance(value, types.ModuleType)]
    places = [function.__globals__]
    for place in places:
        for name in names & place.keys():
            value = place[name]
            if isinstance(value, types.ModuleType) and value not in found:
                found.append(value)
                places.append(vars(value))
    return found


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(entry, _PLAIN) for entry in value)


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def is_torchs(value: Any) -> bool:
    """Whether it is a function or a class of torch, or of those that only compute."""
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
    """All globals and attributes that the code or a function inside it names."""
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
