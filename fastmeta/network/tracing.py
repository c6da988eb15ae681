"""`torch.fx` tracing that other threads do not notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from torch import fx, nn

_tracing = threading.Lock()


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a module's forward; the module itself is not to be used afterwards.

    Arguments that have a default are bound to it, so that `forward` may branch on them. While it
    traces, fx patches `nn.Module` itself for the whole process: other threads are left alone.
    """
    _bind_defaults(model)
    with _tracing:
        return _ThisThreadsTracer().trace(model)


def _bind_defaults(model: nn.Module) -> None:
    """Gives a module with one argument that must be given a class whose forward takes it alone."""
    kind, variable = type(model), (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    _, *arguments = signature(kind.forward).parameters.values()
    needed = [a for a in arguments if a.default is Parameter.empty and a.kind not in variable]
    if len(needed) != 1 or len(arguments) == 1:
        return

    def forward(self: nn.Module, x: Any) -> Any:
        return kind.forward(self, x)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})


class _ThisThreadsTracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that a forward which branches on one can't be traced

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
