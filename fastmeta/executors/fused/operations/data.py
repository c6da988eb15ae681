"""A call's data as the kernel takes it: rows of targets, weights of examples, all in one buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.executors.fused.lowering import Recipe
from fastmeta.tasks import Examples


def of_set(name: str, examples: Examples, recipe: Recipe) -> dict[str, Tensor]:
    """Inputs, targets [T, N, C], weights [T, N], what is missing [T] and maybe factors [T, N, C].

    All means are in the weights: over examples, over columns, by the classes' weights.
    """
    x, y, weights = examples.inputs, examples.targets, examples.weights
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    x, y = x.detach(), y.detach()
    if weights is None:
        weights = x.new_full((1, 1), 1.0 / examples.count).expand(x.shape[:2])
    weights, missing, factors = weights.to(x.dtype), x.new_zeros(x.shape[0]), None
    if recipe.loss.of_classes and not y.is_floating_point():
        y, weights, missing = _of_labels(y, weights, recipe, x)
    elif recipe.loss.of_classes:
        y, weights = _normalised(_smooth(y, recipe), weights)
    else:
        y, factors = recipe.loss.weigh(y) if recipe.loss.weighted else (y, None)
        weights = weights / y.shape[-1]
    found = {"x": x, "targets": y, "weights": weights, "missing": missing}
    if factors is not None:
        found["factors"] = factors
    return {f"{name} {key}": tensor for key, tensor in found.items()}


def _of_labels(
    labels: Tensor, weights: Tensor, recipe: Recipe, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each real label counts by its class's weight; one that is no class makes its task's loss
    no number, which costs no synchronisation as an exception would.
    """
    classes = recipe.layers[-1].outputs
    real = (weights > 0) & (labels != recipe.loss.ignore_index)
    rows = (labels[..., None] == torch.arange(classes, device=labels.device)).to(like)
    wrong = real & ((labels < 0) | (labels >= classes))
    counts = real.to(like)
    if recipe.loss.weight is not None:
        counts = counts * (rows * recipe.loss.weight).sum(-1)
    sums = counts.sum(1, keepdim=True)
    # torch's mean of nothing is no number, and its derivatives are zero.
    missing = torch.where(sums == 0, torch.nan, 0.0) + torch.where(wrong, torch.nan, 0.0).sum(
        1, keepdim=True
    )
    each = torch.where(sums == 0, 0.0, real.to(like) / sums)
    rows, each = _normalised(_smooth(rows, recipe), each)
    return rows, each, missing.to(like)


def _smooth(rows: Tensor, recipe: Recipe) -> Tensor:
    """With label smoothing, and every class by its weight."""
    if recipe.loss.option:
        rows = (1 - recipe.loss.option) * rows + recipe.loss.option / rows.shape[-1]
    return rows if recipe.loss.weight is None else rows * recipe.loss.weight


def _normalised(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that sum to 1, and their sums in the weights."""
    sums = rows.sum(-1, keepdim=True)
    return torch.where(sums == 0, rows, rows / sums), weights * sums.squeeze(-1)
