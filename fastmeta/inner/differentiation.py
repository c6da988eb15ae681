"""Cotangents by autograd through a function's results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def vector_jacobian(results: Any, cotangents: Any, into: list[Tensor]) -> list[Tensor]:
    """The cotangents of `into`, given those of a tree of results; 0 where nothing depends on one.

    The cotangents are a tree like that of the results.
    """
    by_path = dict(pytree.tree_flatten_with_path(cotangents)[0])
    of_results: list[Tensor] = []
    given: list[Tensor] = []
    for path, result in pytree.tree_flatten_with_path(results)[0]:
        if isinstance(result, Tensor) and result.requires_grad:
            of_results.append(result)
            given.append(by_path[path].to(result.dtype).expand_as(result))
    if not of_results or not into:
        return [torch.zeros_like(each) for each in into]
    found = torch.autograd.grad(of_results, into, given, allow_unused=True)
    pairs: list[tuple[Tensor, Tensor | None]] = [*zip(into, found, strict=True)]
    return [torch.zeros_like(each) if one is None else one for each, one in pairs]
