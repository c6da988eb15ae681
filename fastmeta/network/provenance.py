"""Values that Python code reads: constants, torch's own, and those that may change unseen."""

from __future__ import annotations

import functools
import math
import operator
import types
from collections.abc import Hashable
from typing import Any

import numpy
import torch

from fastmeta.network import vocabulary as words

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, numpy.number,
    numpy.bool_,
)  # fmt: skip
MODULES = ("torch", "math", "operator", "typing")
_BUILTINS = frozenset([
    abs, all, any, bool, enumerate, float, int, isinstance, iter, len, list, map, max, min, next,
    pow, print, range, reversed, round, sorted, str, sum, super, tuple, zip,
])  # fmt: skip


def is_plain(value: Any) -> bool:
    """Return whether a value is a constant, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def by_value(value: Any) -> Hashable:
    """A key that equal constants share (but not 1, 1.0 and True), and no other objects."""
    if is_plain(value):
        return type(value), repr(value)
    return value if isinstance(value, Hashable) else id(value)


def is_of_arguments(value: Any) -> bool:
    """Return whether a function's result depends on its arguments alone; classes' does."""
    if value in (operator.attrgetter, operator.methodcaller):
        return False  # of any attribute
    function = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
    return not function or value in _of_arguments()


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
    return home.split(".")[0] in (*MODULES, "_operator", "builtins")
