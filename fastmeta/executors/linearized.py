"""A model at one point for each task: what executors give `fastmeta.linearize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastmeta.tasks import Tree

Tensors = dict[str, Tensor]
"""By the name of a trainable parameter, `[T, ...]`; one that nothing reaches may be missing."""


@dataclass(frozen=True, eq=False)
class Linearized:
    """One pass over one batch a task, and the Hessian products on what it saved."""

    outputs: Tree
    """Leaves `[T, N, ...]`."""
    losses: Tensor
    """`[T]`."""
    gradients: Tensors
    product: Callable[[Tensors], Tensors]
    """Each task's Hessian times its vector."""
