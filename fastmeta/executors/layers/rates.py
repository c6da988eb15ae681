"""The gradients of learned rates, summed as the rates are shared."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.inner_loop import InnerLoop


class RateGradients:
    """The gradient of every learned rate, so far."""

    def __init__(self, inner: InnerLoop) -> None:
        self._inner = inner
        self._totals = {key: torch.zeros_like(r) for key, r in inner.learned_rates().items()}

    def add(self, name: str, step: int, gradient: Tensor) -> None:
        """Add a parameter's part of `dL/da_k`, in the shape of that step's rate."""  # (3)
        key = self._inner.key(name)
        total = self._totals[key]
        part = total[step] if key in self._inner.per_step else total
        part += gradient

    def learned(self) -> list[str]:
        """The adapted parameters whose rates ask for a gradient."""
        return [name for name in self._inner.adapted if self._inner.key(name) in self._totals]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every learned rate with its gradient."""
        return [(rate, self._totals[key]) for key, rate in self._inner.learned_rates().items()]
