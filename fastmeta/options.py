"""The options of a meta-step, as the caller gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.inner import InnerOptimizer

Adapt = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None
Loss = Callable[[Any, Any], Tensor]
Rates = float | Tensor | Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """Everything about a meta-step but its model and its data; documented in `maml_step`."""

    inner_lr: Rates = 0.01
    inner_steps: int = 1
    inner_optimizer: InnerOptimizer | None = None
    loss_fn: Loss = F.cross_entropy
    query_loss_fn: Loss | None = None
    first_order: bool = False
    adapt: Adapt = None
    step_weights: Any = None
    task_weights: Any = None
    prox: float = 0.0
    per_step_support: bool = False
    memory: str = "auto"
    executor: str = "auto"

    def losses(self) -> tuple[Loss, Loss]:
        """Those of the support and the query sets."""
        return self.loss_fn, self.query_loss_fn or self.loss_fn
