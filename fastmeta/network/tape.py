"""Leaves that autograd's graph reaches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def captured_leaves(roots: Sequence[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of the autograd graph of `roots` that are not below `known`."""
    stop: set[Any] = set()
    known_ids: set[int] = set()
    for tensor in known:
        known_ids.add(id(tensor))
        if tensor.grad_fn is not None:
            stop.add(tensor.grad_fn)
    found: list[Tensor] = []
    seen: set[Any] = set(stop)
    pending: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    for root in roots:
        if root.grad_fn is None and root.requires_grad and id(root) not in known_ids:
            found.append(root)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.__class__ is _Leaf:
            if id(node.variable) not in known_ids:
                found.append(node.variable)
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                pending.append(parent)
    return found


_Leaf: Any = torch._C._functions.AccumulateGrad  # pyright: ignore[reportAttributeAccessIssue]
"""A leaf's node in the graph."""
