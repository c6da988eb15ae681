"""What a step does under torch's modes: compiling, inference, transforms of torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from fastmeta.arguments import outside_inference

P = ParamSpec("P")
R = TypeVar("R")


def outermost(step: Callable[P, R]) -> Callable[P, R]:
    """A step that runs outside torch's modes; **raises** `RuntimeError` inside a transform."""

    @functools.wraps(step)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # A graph break: the inner loop differentiates twice, which no compiled graph can.
            outside: Any = torch.compiler.disable(call)
            return outside(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                data: Any = map(outside_inference, args)
                return call(*data, **kwargs)
        if _in_transform():
            raise RuntimeError(
                "model: stepped inside a transform of torch.func, which sees nothing of a step; "
                "call backward() on its loss, outside"
            )
        return step(*args, **kwargs)

    return call


def _in_transform() -> bool:
    """Return whether one of torch.func's transforms is at work."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None
