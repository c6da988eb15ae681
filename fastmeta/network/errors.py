"""Errors of torch's own that name the layer."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn


@contextmanager
def naming_layers(model: nn.Module) -> Generator[None, None, None]:
    """Runs of the model in which a layer of torch's own that raises is named.

    **Raises** `RuntimeError` with its name in front of torch's own words: an image that pools to
    nothing, channels that disagree, rows of another length. An error that the model's own code
    raises stays as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        layer = _innermost(error.__traceback__)
        if layer is None or not type(layer).__module__.startswith("torch.nn.modules"):
            raise
        name = next((name for name, part in model.named_modules() if part is layer), "")
        where = f"model: {name} = {layer}" if name else f"model: {layer}"
        raise RuntimeError(f"{where} can't take its input: {error}") from error


def refuse_unready(module: nn.Module, name: str = "") -> None:
    """Refuse a part of the model whose parameters can't be exchanged for adapted ones.

    **Raises** `TypeError` for a module of TorchScript, which holds its parameters fast, and
    `ValueError` for a lazy one that has none yet.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{f'model: {name}' if name else 'model'}: scripted or traced by torch.jit, whose "
            "parameters can't be exchanged for adapted ones; step the module that it was made of"
        )
    for own, parameter in module._parameters.items():
        if parameter is not None and nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"model: {f'{name}.{own}'.lstrip('.')} is not initialised yet (a lazy module); "
                "run the model once first"
            )


_BAGS = {"sum": "sum(-2)", "mean": "mean(-2)", "max": "amax(-2)"}


def refuse_second_derivative(model: nn.Module, error: NotImplementedError) -> None:
    """Says what to do about an operator whose backward pass torch can't differentiate.

    **Raises** `NotImplementedError`; nothing for an error of another kind.
    """
    found = re.search("derivative for '(.*)' is not implemented", str(error))
    if found is None:
        return
    operator, where, instead = found[1], "model or loss_fn", ""
    for name, part in model.named_modules():
        if isinstance(part, nn.EmbeddingBag) and "embedding_bag" in operator:
            where = f"model: {name} = {part}" if name else f"model: {part}"
            instead = f"use nn.Embedding and .{_BAGS[part.mode]} in its place; or "
    raise NotImplementedError(
        f"{where}: torch has no second derivative of it ({operator}), which meta-gradients take; "
        f"{instead}keep it from adapting by adapt=..., or take first_order=True"
    ) from error


def _innermost(trace: TracebackType | None) -> nn.Module | None:
    """The module whose `forward` was running."""
    found: nn.Module | None = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = owner
        trace = trace.tb_next
    return found
