"""Values that a loss reads beside its arguments, and the loss with others in their places."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from fastmeta.network.hooks import has_hooks
from fastmeta.network.provenance import by_value, is_of_arguments, is_plain, is_torchs

_CALL = nn.Module.__call__
_DEPTH = 8


class Reads:
    """All that a function's result depends on but its arguments.

    `owner` is the object that a method belongs to, whose attributes it reads; functions of the
    user's that it calls are followed.
    """

    def __init__(self, function: types.FunctionType, owner: Any = None, depth: int = 0) -> None:
        code = function.__code__
        named = {n: function.__globals__[n] for n in code.co_names if n in function.__globals__}
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        keywords = function.__kwdefaults__ or {}
        own = {} if owner is None else _attributes(owner, code.co_names)
        self.function, self._owner = function, owner
        self._names, self._keywords, self._own = [*named], [*keywords], [*own]
        self._counts = len(cells), len(named), len(function.__defaults__ or ()), len(keywords)
        mine = [
            *cells, *named.values(), *(function.__defaults__ or ()), *keywords.values(),
            *own.values(),
        ]  # fmt: skip
        self._width = len(mine)
        modules = [value for value in mine if isinstance(value, types.ModuleType)]
        self.called = [vars(m)[n] for m in modules for n in code.co_names if n in vars(m)]
        """Functions of torch, which may be replaced."""
        loaded, self.unknown = _of_code(code)
        """The reason why not all of it is known; empty where it is."""
        bare = loaded - named.keys()  # `x.pow` is no builtin
        builtin = [vars(builtins)[name] for name in bare & vars(builtins).keys()]
        if not all(map(is_of_arguments, (*self.called, *builtin))):
            self.unknown = self.unknown or "calls a function whose answer may change unseen"
        self._children: dict[int, Reads] = {}
        for place, value in enumerate(mine):
            if _is_known(value):
                continue
            inner = function_of(value) if depth < _DEPTH else None
            if inner is None:
                self.unknown = self.unknown or f"reads {type(value).__name__}"
                continue
            child = self._children[place] = Reads(*inner, depth + 1)
            self.unknown = self.unknown or child.unknown
        self.values: list[Any] = [*mine]
        for child in self._children.values():
            self.values += child.values

    @property
    def known(self) -> bool:
        """Return whether all that it depends on is known."""
        return not self.unknown

    @property
    def alone(self) -> bool:
        """Return whether it calls no other function of the user's."""
        return not self._children and self._owner is None

    def key(self, marked: frozenset[int]) -> Hashable:
        """A key of its trace, without the values that are marked."""
        codes, values = self._parts
        for place in marked:
            values = (*values[:place], type(self.values[place]), *values[place + 1 :])
        return codes, marked, values

    @functools.cached_property
    def _parts(self) -> tuple[tuple[Any, ...], tuple[Hashable, ...]]:
        """The code that runs, and all values by value: asked for several times a step."""
        codes: tuple[Any, ...] = (self.function.__code__, *self.called)
        values: tuple[Hashable, ...] = tuple(
            type(value) if place in self._children else by_value(value)
            for place, value in enumerate(self.values[: self._width])
        )
        for child in self._children.values():
            codes, values = codes + child._parts[0], values + child._parts[1]
        return codes, values

    def forms(self) -> Hashable:
        """The forms of the tensors that it reads."""
        return tuple(
            (v.shape, v.dtype, v.device, v.requires_grad, v.is_leaf)
            for v in self.values
            if isinstance(v, Tensor)
        )

    def with_values(self, given: Mapping[int, Any]) -> Callable[..., Any]:
        """The function with other values in some places."""
        function = self.function
        values = [given.get(place, value) for place, value in enumerate(self.values)]
        mine, start = values[: self._width], self._width
        for place, child in self._children.items():
            own = range(start, start + len(child.values))
            mine[place] = child.with_values({i - start: given[i] for i in own if i in given})
            start += len(child.values)
        cells, named, defaults, keywords = self._counts
        after = cells + named
        copy = types.FunctionType(
            function.__code__,
            dict(zip(self._names, mine[cells:after], strict=True)),
            function.__name__,
            tuple(mine[after : after + defaults]),
            tuple(map(types.CellType, mine[:cells])),
        )
        first = after + defaults
        copy.__kwdefaults__ = dict(zip(self._keywords, mine[first : first + keywords], strict=True))
        if self._owner is None:
            return copy
        stand_in = types.SimpleNamespace(
            **dict(zip(self._own, mine[first + keywords :], strict=True))
        )
        return types.MethodType(copy, stand_in)


def function_of(loss_fn: Any) -> tuple[types.FunctionType, Any] | None:
    """The Python function that runs where an object is called, and its owner; None of others."""
    if isinstance(loss_fn, types.FunctionType):
        return None if is_torchs(loss_fn) else (loss_fn, None)
    if isinstance(loss_fn, types.MethodType):
        function, owner = loss_fn.__func__, loss_fn.__self__
    elif isinstance(loss_fn, nn.Module):
        plain = nn.Module.__call__ is _CALL and not has_hooks(loss_fn)
        if not plain or "forward" in vars(loss_fn) or type(loss_fn).__call__ is not _CALL:
            return None
        function, owner = type(loss_fn).forward, loss_fn
    else:
        found = (vars(kind).get("__call__") for kind in type(loss_fn).__mro__)
        function, owner = next(filter(None, found), None), loss_fn
    if not isinstance(function, types.FunctionType) or isinstance(owner, type):
        return None
    if is_torchs(function) or type(owner).__getattribute__ not in _GETTERS:
        return None
    return function, owner


_LOOKING = frozenset([
    "isinstance", "issubclass", "type", "float", "int", "bool", "hasattr", "getattr", "vars",
    "callable", "print", "id", "repr", "str", "format", "setattr",
])  # fmt: skip
"""Functions of Python's that tell a symbol from the tensor or number that it stands for."""


@functools.lru_cache(maxsize=1024)
def _of_code(code: types.CodeType) -> tuple[frozenset[str], str]:
    """The names of globals and builtins that code loads, and why not all it does can be known."""
    steps = dis.get_instructions(code)
    loaded = frozenset(s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return loaded, "holds a function, which reads what it likes"
    if bound := _binds(code):
        return loaded, f"writes {bound}"
    if looks := loaded & _LOOKING:
        return loaded, f"calls {min(looks)}, which sees more than numbers"
    return loaded, ""


def _binds(code: types.CodeType) -> str:
    """The first name that code changes outside itself; empty where there is none."""
    for step in dis.get_instructions(code):
        kind, _, place = step.opname.partition("_")
        if kind in ("STORE", "DELETE") and place in ("ATTR", "GLOBAL", "SUBSCR"):
            return str(step.argval or "an entry")
        if kind in ("STORE", "DELETE") and place == "DEREF" and step.argval in code.co_freevars:
            return str(step.argval)
    return ""


_GETTERS = (object.__getattribute__,)


def reads(loss_fn: Callable[..., Any]) -> Reads | None:
    """All that a loss reads; None where it is no Python function."""
    if isinstance(loss_fn, functools.partial):
        return None
    found = function_of(loss_fn)
    return None if found is None else Reads(*found)


def _attributes(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The attributes of an object that code reads by these names, methods bound."""
    found: dict[str, Any] = {}
    for name in names:
        own = getattr(owner, "__dict__", {})
        held = [own, own.get("_parameters", {}), own.get("_buffers", {})]
        if any(name in each for each in held) or name in vars(type(owner)):
            found[name] = getattr(owner, name)
    return found


def _is_known(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return value.__name__.split(".")[0] == "torch" or value.__name__ == "math"
    if isinstance(value, Tensor) or is_plain(value):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        return is_torchs(value) and is_of_arguments(value)
    return isinstance(value, types.FunctionType) and is_torchs(value) and is_of_arguments(value)
