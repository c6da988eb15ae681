"""`torch.func.vmap` over the tasks, without what it checks anew at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.vmap import lazy_load_decompositions

from fastmeta.tasks import Tree, map_tensors


def over_tasks(function: Callable[[Tensor, Tree], Tensor], z: Tensor, targets: Tree) -> Tensor:
    """`[T]`, the function's 0-d result of each task.

    **Raises** `RuntimeError` where operations can't be mapped.
    """
    lazy_load_decompositions()
    tasks, functions = len(z), _functions
    level = functions._vmap_increment_nesting(tasks, "error")
    try:

        def each(leaf: Tensor) -> Tensor:
            return functions._add_batch_dim(leaf, 0, level)

        found = function(each(z), map_tensors(each, targets))
        return functions._remove_batch_dim(found, level, tasks, 0)
    finally:
        functions._vmap_decrement_nesting()


_functions: Any = _functorch
