"""Losses, by torch's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastmeta.network.expressions.tracing import Symbol, Untraceable, elementwise, symbol
from fastmeta.network.expressions.vocabulary.arithmetic import detach, greater, square, where
from fastmeta.network.expressions.vocabulary.reductions import averaged, hot_rows, logsumexp, summed
from fastmeta.network.expressions.vocabulary.registry import ANSWERS, answers
from fastmeta.network.expressions.vocabulary.shapes import unsqueeze


def _loss(each: Symbol, reduction: str, **options: Any) -> Symbol:
    """The reduced loss, of options that are at their defaults."""
    for name, value in options.items():
        if value is not None and (name, value) != ("ignore_index", -100):
            raise Untraceable(f"a loss has the option {name}")
    if reduction == "none":
        return each
    if reduction not in ("mean", "sum"):
        raise Untraceable(f"it reduces a loss by {reduction!r}")
    return averaged(each) if reduction == "mean" else summed(each)


def _by_error(of: Callable[..., Symbol]) -> Callable[..., Symbol]:
    def loss(
        input: Any, target: Any, *, reduction: str = "mean", size_average: Any = None,
        reduce: Any = None, weight: Any = None, **options: Any,
    ) -> Symbol:  # fmt: skip
        each = of(input - target, **options)
        return _loss(each, reduction, size_average=size_average, reduce=reduce, weight=weight)

    return loss


ANSWERS["mse_loss"] = _by_error(lambda error: square(error))
ANSWERS["l1_loss"] = _by_error(lambda error: elementwise("absolute", error))


def _huber_of(error: Symbol, delta: Any = 1.0) -> Symbol:
    size = elementwise("absolute", error)
    return where(
        elementwise("less", size, delta), 0.5 * error * error, delta * (size - 0.5 * delta)
    )


ANSWERS["huber_loss"] = _by_error(_huber_of)


def _smooth_of(error: Symbol, beta: Any = 1.0) -> Symbol:
    straight, bent = elementwise("absolute", error), _huber_of(error, beta)
    if not isinstance(beta, Symbol):
        return bent / beta if beta else straight
    return where(elementwise("equal", beta, 0.0), straight, bent / beta)


ANSWERS["smooth_l1_loss"] = _by_error(_smooth_of)


@answers("binary_cross_entropy_with_logits")
def _bce(
    input: Any, target: Any, weight: Any = None, *, reduction: str = "mean",
    pos_weight: Any = None, **options: Any,
) -> Symbol:  # fmt: skip
    if pos_weight is None:
        each = elementwise("softplus", input) - input * target
    else:
        positive = target * pos_weight
        each = (1.0 - target + positive) * elementwise("softplus", input) - input * positive
    return _loss(each if weight is None else each * weight, reduction, **options)


@answers("nll_loss")
def _nll_loss(
    input: Symbol, target: Symbol, weight: Any = None, *, reduction: str = "mean", **options: Any
) -> Symbol:
    each = -summed(input * hot_rows(unsqueeze(target, 1), input.axes[1]), 1)
    return _loss(each, reduction, weight=weight, **options)


@answers("cross_entropy")
def _cross_entropy(
    input: Symbol, target: Symbol, weight: Any = None, *, reduction: str = "mean",
    label_smoothing: float = 0.0, **options: Any,
) -> Symbol:  # fmt: skip
    if input.ndim != 2:
        raise Untraceable("it takes the cross-entropy of what is not [N, C]")
    classes = input.axes[1]
    hot = target if target.ndim == 2 else hot_rows(unsqueeze(target, 1), classes)
    if isinstance(label_smoothing, Symbol) or label_smoothing:
        hot = hot * (1 - label_smoothing) + label_smoothing / classes
    mass = summed(target, 1) if target.ndim == 2 else 1.0
    each = mass * logsumexp(input, 1) - summed(input * hot, 1)
    return _loss(each, reduction, weight=weight, **options)


@answers("kl_div")
def _kl_div(
    input: Any, target: Any, *, reduction: str = "mean", log_target: bool = False, **options: Any
) -> Symbol:
    if log_target:
        each = elementwise("exp", target) * (target - input)
    else:
        entropy = target * elementwise("log", target)
        each = where(greater(target, 0.0), entropy, 0.0) - target * input
    if reduction == "batchmean":
        each, reduction = summed(each, -1), "mean"
    return _loss(each, reduction, **options)


@answers("gaussian_nll_loss")
def _gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6,
    reduction: str = "mean",
) -> Symbol:  # fmt: skip
    var = symbol(var, next(v for v in (input, target, var) if isinstance(v, Symbol)))
    # torch clamps the variance without a derivative's notice.
    safe = var + detach(elementwise("maximum", var, eps) - var)
    each = 0.5 * (elementwise("log", safe) + square(input - target) / safe)
    return _loss(each + (0.5 * math.log(2 * math.pi) if full else 0.0), reduction)


@answers("poisson_nll_loss")
def _poisson_nll_loss(
    input: Any, target: Any, log_input: bool = True, full: bool = False, size_average: Any = None,
    eps: float = 1e-8, reduce: Any = None, reduction: str = "mean",
) -> Symbol:  # fmt: skip
    if full:
        raise Untraceable("it asks for the full poisson_nll_loss")
    if log_input:
        each = elementwise("exp", input) - target * input
    else:
        each = input - target * elementwise("log", input + eps)
    return _loss(each, reduction)


@answers("soft_margin_loss")
def _soft_margin_loss(
    input: Any, target: Any, *, reduction: str = "mean", **options: Any
) -> Symbol:
    return _loss(elementwise("softplus", -target * input), reduction, **options)
