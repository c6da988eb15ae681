"""Recognition of the standard losses in a function, lambda, partial or module."""

from __future__ import annotations

import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.network.hooks import has_hooks
from fastmeta.network.losses.reads import Reads
from fastmeta.network.losses.standard import Loss
from fastmeta.network.tracing import trace

_FUNCTIONS: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.huber_loss: "huber_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.l1_loss: "l1_loss",
}
_MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (
        F.cross_entropy,
        ("weight", "ignore_index", "reduction", "label_smoothing"),
    ),
    nn.MSELoss: (F.mse_loss, ("reduction",)),
    nn.BCEWithLogitsLoss: (
        F.binary_cross_entropy_with_logits,
        ("weight", "reduction", "pos_weight"),
    ),
    nn.HuberLoss: (F.huber_loss, ("reduction", "delta")),
    nn.SmoothL1Loss: (F.smooth_l1_loss, ("reduction", "beta")),
    nn.L1Loss: (F.l1_loss, ("reduction",)),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"weight": None, "ignore_index": -100, "label_smoothing": 0.0},
    "mse_loss": {},
    "binary_cross_entropy_with_logits": {"weight": None, "pos_weight": None},
    "huber_loss": {"delta": 1.0},
    "smooth_l1_loss": {"beta": 1.0},
    "l1_loss": {},
}
_DEFAULT = {kind: Loss(kind, {}) for kind in _OPTIONS}
_STANDARD = {function: _DEFAULT[kind] for function, kind in _FUNCTIONS.items()}
_FORWARDS = {kind: kind.forward for kind in _MODULES}
_CALL = nn.Module.__call__


def recognise(loss_fn: Callable[..., Any], read: Reads | None = None) -> Loss | None:
    """The standard loss that `loss_fn` is, with its options as they are now; None for any other.

    `read`: what it reads, where that is known.
    """
    if isinstance(loss_fn, nn.Module):
        return _from_module(loss_fn)
    if isinstance(loss_fn, functools.partial):
        inner = recognise(loss_fn.func)
        if inner is None or loss_fn.args or inner.options:
            return None
        return _build(inner.kind, loss_fn.keywords)
    if not isinstance(loss_fn, types.FunctionType):
        return None
    return _STANDARD.get(loss_fn) or _from_function(read or Reads(loss_fn))


def identity(loss_fn: Callable[..., Any]) -> Hashable:
    """A key for a loss that is no standard one, which does not keep it alive."""
    code = getattr(loss_fn, "__code__", None)
    try:
        return _Same(loss_fn) if code is None else code
    except TypeError:  # no weak reference to it
        return type(loss_fn)


class _Same:
    """An object as a key, for as long as it lives."""

    def __init__(self, value: Any) -> None:
        self._id, self._value = id(value), weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._id != other._id:
            return False
        return self._value() is not None and self._value() is other._value()

    def __hash__(self) -> int:
        return self._id


def _build(kind: str, keywords: Mapping[str, Any]) -> Loss | None:
    # None is "not given" for every option that torch's losses have.
    given = {name: value for name, value in keywords.items() if value is not None}
    if given.pop("reduction", "mean") != "mean":
        return None
    defaults = _OPTIONS[kind]
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in defaults:
            return None
        if isinstance(value, Tensor):
            if value.requires_grad:
                return None
            options[name] = value
        elif not isinstance(value, (int, float)) or not _in_range(name, value):
            return None  # torch says what is wrong with it
        elif value != defaults[name]:
            options[name] = value
    return Loss(kind, options) if options else _DEFAULT[kind]


def _in_range(name: str, value: float) -> bool:
    if name == "label_smoothing":
        return 0 <= value <= 1
    return name == "ignore_index" or value > 0 or (name == "beta" and value == 0)


def _from_module(module: nn.Module) -> Loss | None:
    kind = type(module)
    entry = _MODULES.get(kind)
    if entry is None or has_hooks(module) or "forward" in vars(module):
        return None
    function, names = entry
    name = _FUNCTIONS[function]
    # torch's own may have been replaced.
    if getattr(F, name) is not function or kind.forward is not _FORWARDS[kind]:
        return None
    if nn.Module.__call__ is not _CALL:
        return None
    return _build(name, {option: getattr(module, option) for option in names})


def _from_function(reads: Reads) -> Loss | None:
    """A lambda or def that does nothing but call a standard loss on its two arguments."""
    if not (reads.known and reads.alone):
        return None
    # Numbers and tensors may change from call to call, so they are identified by where they stand.
    places = frozenset(i for i, value in enumerate(reads.values) if _varies(value))
    found = _traced(reads, places)
    if found is None and places and not any(isinstance(v, Tensor) for v in reads.values):
        found = _traced(reads, frozenset())
    if found is None:
        return None
    kind, options = found
    return _build(
        kind,
        {
            name: reads.values[value.place] if isinstance(value, _Mark) else value
            for name, value in options.items()
        },
    )


def _varies(value: Any) -> bool:
    return type(value) is float or isinstance(value, Tensor)


class _Mark(float):
    """A number that stands for a constant of a function, and can be passed on, but not used."""

    place: int


def _refuse(*_: Any) -> Any:
    raise TypeError("a constant of the loss is computed with")


for _name, _value in vars(float).items():
    if _name not in ("__new__", "__getattribute__", "__hash__", "__repr__", "__doc__"):
        setattr(_Mark, _name, _refuse if callable(_value) else property(_refuse))


_Traced = tuple[str, dict[str, Any]] | None
_traces: dict[Hashable, _Traced] = {}
"""By what a function reads, but for marked values: these may hold a graph, or a model."""


def _traced(reads: Reads, marked: frozenset[int]) -> _Traced:
    """The kind of the loss that a function calls, and its options, marks among them."""
    key = reads.key(marked)
    if key not in _traces:
        while len(_traces) >= 256:
            _traces.pop(next(iter(_traces)), None)
        _traces[key] = _trace(reads.with_values({place: _mark(place) for place in marked}), marked)
    return _traces[key]


def _mark(place: int) -> _Mark:
    mark = _Mark("nan")
    mark.place = place
    return mark


def _trace(function: Callable[..., Any], marked: frozenset[int]) -> _Traced:
    arguments = inspect.signature(function).parameters.values()
    if sum(argument.default is inspect.Parameter.empty for argument in arguments) != 2:
        return None
    try:
        graph = trace(_TwoArguments(function))
    except Exception:  # Whatever tracing trips over, the function is not a plain loss call.
        return None
    nodes = list(graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "placeholder", "call_function", "output"]:
        return None
    prediction, target, call, output = nodes
    kind = _FUNCTIONS.get(call.target)
    if kind is None or output.args[0] is not call:
        return None
    options = inspect.signature(call.target).bind(*call.args, **call.kwargs).arguments
    if options.pop("input", None) is not prediction or options.pop("target", None) is not target:
        return None
    marks = frozenset(value.place for value in options.values() if isinstance(value, _Mark))
    numbers = [v for v in options.values() if isinstance(v, float) and not isinstance(v, _Mark)]
    # One that is missing may have decided something.
    return None if marks != marked or any(map(math.isnan, numbers)) else (kind, options)


class _TwoArguments(nn.Module):
    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, prediction: Any, target: Any) -> Any:
        return self._function(prediction, target)
