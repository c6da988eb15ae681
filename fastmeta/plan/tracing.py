"""`torch.fx` tracing that other threads do not notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_tracing = threading.Lock()


def trace(model: nn.Module) -> fx.Graph:
    """`fx.Tracer().trace` that leaves other threads alone.

    While it traces, fx patches `nn.Module` itself for the whole process.
    """
    with _tracing:
        return _ThisThreadsTracer().trace(model)


class _ThisThreadsTracer(fx.Tracer):
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
