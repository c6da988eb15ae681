"""Which layer could not take its input, in words."""

from __future__ import annotations

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


def refuse_scripted(module: nn.Module, label: str) -> None:
    """**Raises** `TypeError` for a module of TorchScript, which holds its parameters fast."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{label}: scripted or traced by torch.jit, whose parameters can't be exchanged for "
            "adapted ones; step the module that it was made of"
        )


def _innermost(trace: TracebackType | None) -> nn.Module | None:
    """The module whose `forward` was running."""
    found: nn.Module | None = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = owner
        trace = trace.tb_next
    return found
