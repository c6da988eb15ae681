"""The standard losses: how they are recognised, written out, weighted and checked."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.plan.tracing import trace

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


@dataclass(frozen=True, eq=False)
class Loss:
    """A standard loss with mean reduction; `options` holds what differs from its defaults."""

    kind: str
    options: Mapping[str, Any]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean over all examples, as torch computes it."""
        return getattr(F, self.kind)(prediction, target, **self.options)

    def weighted(self, prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        """The mean over the examples with weight: `weights` is `[N]`, zero on the padding."""
        if self.kind == "cross_entropy" and not target.is_floating_point():
            return self._weighted_cross_entropy(prediction, target, weights)
        if self.kind in ("huber_loss", "smooth_l1_loss"):
            each = self._huber(prediction, target)
        elif self.kind == "mse_loss":
            each = (prediction - target).square()
        else:
            each = getattr(F, self.kind)(prediction, target, **self.options, reduction="none")
        each = each.flatten(1).mean(1) if each.dim() > 1 else each
        return (each * weights.to(each.dtype)).sum()

    def check(self, label: str, target: Any, prediction: tuple[int, ...]) -> None:
        """Refuses targets `[T, N, ...]` that do not fit predictions `[N, ...]` of one task.

        Label values are read where that costs no synchronisation, on the CPU.
        """
        if not isinstance(target, Tensor):
            return
        shape = tuple(target.shape[1:])
        prediction = (target.shape[1], *prediction[1:])
        if self.kind == "cross_entropy" and not target.is_floating_point():
            self._check_labels(label, target, prediction)
        elif shape != prediction:
            raise ValueError(
                f"{label}: shape {list(target.shape)}, but {self.kind} compares it with "
                f"predictions of [T, N, ...] = {[target.shape[0], *prediction]}; both need the "
                "same shape"
            )
        elif not target.is_floating_point():
            raise TypeError(
                f"{label}: {target.dtype}, but {self.kind} needs floating-point targets"
            )

    def key(self) -> tuple[Any, ...]:
        """What tells two such losses apart."""
        values = (id(v) if isinstance(v, Tensor) else v for v in self.options.values())
        return (self.kind, *self.options, *values)

    def __str__(self) -> str:
        shown = ", ".join(
            f"{name}={'tensor' if isinstance(value, Tensor) else value}"
            for name, value in self.options.items()
        )
        return f"{self.kind}({shown})" if shown else self.kind

    def _huber(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        size = error.abs()
        if self.kind == "huber_loss":
            delta = self.options.get("delta", 1.0)
            return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))
        beta = self.options.get("beta", 1.0)
        if beta == 0:
            return size
        return torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)

    def _weighted_cross_entropy(
        self, prediction: Tensor, target: Tensor, weights: Tensor
    ) -> Tensor:
        # Padding becomes a label that torch itself leaves out of the mean.
        ignore = self.options.get("ignore_index", -100)
        shape = (-1,) + (1,) * (target.dim() - 1)
        real = (weights > 0).view(shape)
        return self(prediction, torch.where(real, target, ignore))

    def _check_labels(self, label: str, target: Tensor, prediction: tuple[int, ...]) -> None:
        expected = (prediction[0], *prediction[2:])
        if tuple(target.shape[1:]) != expected:
            raise ValueError(
                f"{label}: shape {list(target.shape)}, but class labels for predictions of "
                f"[T, N, C, ...] = {[target.shape[0], *prediction]} must be "
                f"{[target.shape[0], *expected]}"
            )
        if target.dtype != torch.int64:
            raise TypeError(f"{label}: {target.dtype}; class labels must be torch.int64")
        if target.device.type != "cpu":
            return
        classes, ignore = prediction[1], self.options.get("ignore_index", -100)
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= classes:
            outside = ((target < 0) | (target >= classes)) & (target != ignore)
            if outside.any():
                where = outside.nonzero()[0].tolist()
                raise ValueError(
                    f"{label}: label {int(target[tuple(where)])} at {where}; the model gives "
                    f"{classes} classes, so labels must be in 0 .. {classes - 1}"
                )


def recognise(loss_fn: Callable[..., Any]) -> Loss | None:
    """The standard loss that `loss_fn` is: a function, `partial`, lambda or module; else None."""
    if isinstance(loss_fn, nn.Module):
        return _from_module(loss_fn)
    if isinstance(loss_fn, functools.partial):
        inner = recognise(loss_fn.func)
        if inner is None or loss_fn.args or inner.options:
            return None
        return _build(inner.kind, loss_fn.keywords)
    if loss_fn in _FUNCTIONS:
        return _build(_FUNCTIONS[loss_fn], {})
    if isinstance(loss_fn, types.FunctionType):
        return _from_function(loss_fn)
    return None


def _build(kind: str, keywords: Mapping[str, Any]) -> Loss | None:
    # None is "not given" for every option that torch's losses have.
    given = {name: value for name, value in keywords.items() if value is not None}
    if given.pop("reduction", "mean") != "mean":
        return None
    defaults = _OPTIONS[kind]
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in defaults or (isinstance(value, Tensor) and value.requires_grad):
            return None
        if isinstance(value, Tensor) or value != defaults[name]:
            options[name] = value
    return Loss(kind, options)


def _from_module(module: nn.Module) -> Loss | None:
    entry = _MODULES.get(type(module))
    if entry is None or _hooked(module) or "forward" in vars(module):
        return None
    function, names = entry
    return _build(_FUNCTIONS[function], {name: getattr(module, name) for name in names})


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _from_function(function: types.FunctionType) -> Loss | None:
    """A lambda or def that does nothing but call a standard loss on its two arguments."""
    key = _constants(function)
    return None if key is None else _traced(_Keyed(function, key))


class _Keyed:
    """A function that is equal to another of the same code and the same constants."""

    def __init__(self, function: types.FunctionType, key: tuple[Any, ...]) -> None:
        self.function = function
        self._key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _constants(function: types.FunctionType) -> tuple[Any, ...] | None:
    """All that a function's result depends on but its arguments; None where that can't be told."""
    code = function.__code__
    if any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return None  # a function inside it reads what it likes
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = [function.__globals__[n] for n in code.co_names if n in function.__globals__]
    values = [*cells, *names, *(function.__defaults__ or ())]
    values += (function.__kwdefaults__ or {}).values()
    plain = (int, float, str, bool, type(None), types.BuiltinFunctionType)
    for value in values:
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] != "torch":
                return None
        elif not isinstance(value, plain) and value not in _loss_functions():
            return None
    # torch's functions may be replaced.
    called = [
        vars(value)[name]
        for value in values
        if isinstance(value, types.ModuleType)
        for name in code.co_names
        if name in vars(value)
    ]
    return (code, *((type(value), value) for value in values), *map(id, called))


def _loss_functions() -> list[Any]:
    return list(_FUNCTIONS)


@functools.lru_cache(maxsize=256)
def _traced(keyed: _Keyed) -> Loss | None:
    function = keyed.function
    if len(inspect.signature(function).parameters) != 2:
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
    bound = inspect.signature(call.target).bind(*call.args, **call.kwargs).arguments
    if bound.pop("input", None) is not prediction or bound.pop("target", None) is not target:
        return None
    return _build(kind, bound)


class _TwoArguments(nn.Module):
    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, prediction: Any, target: Any) -> Any:
        return self._function(prediction, target)
