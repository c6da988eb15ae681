"""One call of the compiled step: addresses in, losses and gradients out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastmeta.executors.fused import rates
from fastmeta.executors.fused.kernel import Kernel
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.tasks import Examples


class WrongLabel(Exception):
    """A label is none of the network's classes."""


def run(problem: Problem, kernel: Kernel) -> Outcome:
    """Computes the step; `declines` must have found nothing.

    **Raises** `WrongLabel`, before anything is computed.
    """
    inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
    step, recipe, names = kernel.step, kernel.recipe, kernel.names
    named = problem.model.all_parameters()
    parameters = [None if n is None else _readable(named[n]) for n in names]
    rate = kernel.one_rate(inner, weights)
    if rate is None:
        rate = rates.packed(inner, named, names, weights)
    statistics = _statistics(problem, recipe)
    support, query = _arrays(tasks.support, recipe), _arrays(tasks.query, recipe)
    count, size = tasks.tasks, tasks.query.count if tasks.query else 0
    step_losses = weights.new_zeros(inner.steps + 1, count)
    support_losses = weights.new_empty(inner.steps, count)
    outputs = weights.new_empty(count, size, recipe.layers[-1].outputs)
    gradient = weights.new_empty(step.gradients if problem.differentiate else 0)
    adapted = {
        name: weights.new_empty(count, *named[name].shape)
        for name in (inner.adapted if problem.keep_adapted else ())
    }
    task_weights = _readable(weights)
    computed = step.run(
        count,
        [_address(p) for p in parameters],
        [_address(adapted.get(name or "")) for name in names] if adapted else [],
        [_address(t) for t in statistics],
        rate.data_ptr(),
        inner.step_weights,
        kernel.evaluates,
        task_weights.data_ptr(),
        [_address(t) for t in support],
        [_address(t) for t in query],
        support_losses.data_ptr(),
        step_losses.data_ptr(),
        outputs.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    if not computed:
        raise WrongLabel
    outcome = Outcome(
        step_losses, support_losses, outputs if tasks.query else None, adapted=adapted
    )
    if problem.differentiate:
        outcome.gradients = _gradients(problem, kernel, named, gradient)
    return outcome


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _readable(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in order in memory; itself where they are."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().contiguous()


def _statistics(problem: Problem, recipe: Recipe) -> list[Tensor | None]:
    """Mean and 1 / standard deviation, where running statistics are used."""
    found: list[Tensor | None] = []
    for layer in recipe.layers:
        norm = layer.norm
        if norm is None or norm.batch_statistics:
            found += [None, None]
            continue
        assert norm.mean is not None
        assert norm.variance is not None
        module = problem.model.module
        mean, variance = module.get_buffer(norm.mean), module.get_buffer(norm.variance)
        found += [mean.contiguous(), (variance + norm.eps).rsqrt()]
    return found


def _arrays(examples: Examples | None, recipe: Recipe) -> list[Tensor | None]:
    """Inputs, targets, labels, example weights and the loss's weights."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    factors = None
    if recipe.weighted:
        y, factors = _weigh(y.detach(), recipe)
    y = _readable(y)
    floating = y.is_floating_point()
    return [
        _readable(x),
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype).contiguous(),
        factors,
    ]


def _weigh(y: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """The targets and weights of a weighted loss as the kernels take them."""
    weight, pos_weight = recipe.weight, recipe.pos_weight
    if recipe.loss == 0:
        return y, None if weight is None else weight.contiguous()
    # w ((1 - y) z + (1 + (p - 1) y) softplus(-z)) is c softplus(z) - t z with these c and t.
    positive = y if pos_weight is None else y * pos_weight
    factors = 1 - y + positive
    if weight is not None:
        positive, factors = positive * weight, factors * weight
    return positive, factors.contiguous()


def _gradients(
    problem: Problem, kernel: Kernel, named: dict[str, Any], packed: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Every leaf with its gradient: views of `packed`, parameters first, then learned rates."""
    used = [name for name in kernel.names if name is not None]
    parts = _unflatten_dense_tensors(packed, [named[name] for name in used])
    by_name = dict(zip(used, parts, strict=True))
    pairs: list[tuple[Tensor, Tensor | None]] = [
        (parameter, by_name.get(name)) for name, parameter in problem.model.parameters().items()
    ]
    inner = problem.inner
    if inner.learned_rates():
        start = sum(part.numel() for part in parts)
        # Not by division: no steps have rates too.
        width = start if rates.elementwise(inner) else len(kernel.names)
        found = packed[start:].view(inner.steps, width)
        pairs += rates.gradients(inner, named, kernel.names, found)
    return pairs
