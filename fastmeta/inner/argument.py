"""The argument `inner_optimizer`, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmeta.inner.optimizer import InnerOptimizer
from fastmeta.inner.sgd import SGD
from fastmeta.wording import a_kind


def inner_optimizer(value: Any) -> InnerOptimizer:
    """The update rule that an argument stands for; None is plain gradient descent.

    **Raises** `TypeError` for anything that is no instance of `InnerOptimizer`.
    """
    if value is None:
        return SGD()
    if isinstance(value, InnerOptimizer):
        _refuse_hidden_modules(value)
        return value
    if isinstance(value, type):
        instead = f"; write {value.__name__}()" if issubclass(value, InnerOptimizer) else ""
        raise TypeError(
            f"inner_optimizer: the class {value.__name__}; it must be an instance of "
            f"fastmeta.inner.InnerOptimizer{instead}"
        )
    instead = ""
    if isinstance(value, torch.optim.Optimizer):
        instead = "; those of torch.optim change parameters in place, so that nothing flows back"
    raise TypeError(
        f"inner_optimizer: {a_kind(value)}; it must be None, one of fastmeta.inner's, or an "
        f"instance of your own fastmeta.inner.InnerOptimizer{instead}"
    )


def _refuse_hidden_modules(rule: InnerOptimizer) -> None:
    """**Raises** `TypeError` for a module whose parameters would get no gradient."""
    if isinstance(rule, nn.Module):
        return
    for name, value in vars(rule).items():
        if isinstance(value, nn.Module):
            own = type(rule).__name__
            raise TypeError(
                f"inner_optimizer: {own}.{name} is a module, whose parameters would get no "
                f"gradient; write class {own}(InnerOptimizer, nn.Module), and super().__init__()"
            )
