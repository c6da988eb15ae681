"""The gradients of learned rates, summed as the rates are shared."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.inner_loop import SHARED, InnerLoop


class RateGradients:
    """The gradient of every learned rate, so far."""

    def __init__(self, inner: InnerLoop) -> None:
        self._inner = inner
        self._totals = {key: torch.zeros_like(r) for key, r in inner.learned_rates().items()}

    def add(self, name: str, step: int, product: Tensor) -> None:
        """Adds a parameter's part of `dL/da_k`, `[T, ...]`, a number for each element."""  # (3)
        key = SHARED if self._inner.shared else name
        if key not in self._totals:
            return
        total = self._totals[key]
        part = total[step] if key in self._inner.per_step else total
        part += product.sum(0).sum_to_size(part.shape) if part.dim() else product.sum()

    def wanted(self, name: str) -> bool:
        """Whether this parameter's rate asks for a gradient."""
        return (SHARED if self._inner.shared else name) in self._totals

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every learned rate with its gradient."""
        return [(rate, self._totals[key]) for key, rate in self._inner.learned_rates().items()]
