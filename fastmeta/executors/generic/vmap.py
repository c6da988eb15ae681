"""All tasks of a chunk at once: `vmap` over tasks of `grad` through the unrolled inner loop.

Never the other way round: `grad(vmap(grad))` is silently wrong through affine batch norm in
torch 2.13 (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.func import vmap as over_tasks
from torch.utils import _pytree as pytree

from fastmeta.executors.generic.features import Body, Kept, Model
from fastmeta.executors.generic.leaves import filled, set_at, stepped, with_prox
from fastmeta.executors.problem import FormUnavailable, Outcome, Problem
from fastmeta.inner.one_task import one_task
from fastmeta.tasks import map_tensors


def run(problem: Problem, chunk: int, body: Body | None = None) -> Outcome:
    """Computes the step by `vmap`, `chunk` tasks at a time; a `body` is run once a chunk and set.

    **Raises** `FormUnavailable` where loss or model captures a tensor that requires grad, or does
    on these data what can't be mapped, and `NotKept` where the body turns out to be run at every
    pass.
    """
    inner, batch = problem.inner, problem.tasks
    theta = {name: p.detach() for name, p in problem.model.parameters().items()}
    learned = (
        (inner.learned_rates(), inner.learned_options()) if problem.differentiate else ({}, {})
    )
    leaves, spec = pytree.tree_flatten(
        tuple(
            (examples.inputs, examples.targets, _optional(examples.weights))
            for examples in batch.given()
        )
    )
    moving = [problem.differentiate and leaf.requires_grad for leaf in leaves]
    function = over_tasks(
        _task_function(problem, spec, moving, body),
        in_dims=(None, None, 0, 0, 0),
        randomness="different",
    )
    scratch = problem.model.scratch()
    sums: list[Tensor] | None = None
    data_parts: list[list[Tensor]] = []
    auxiliary: list[Any] = []
    for start in range(0, batch.tasks, chunk):
        part = slice(start, min(start + chunk, batch.tasks))
        size = part.stop - part.start
        data = [leaf.detach()[part] for leaf in leaves]
        try:
            gradients, extra = function(
                theta,
                tuple(map(_detached, learned)),
                [leaf for leaf, moves in zip(data, moving, strict=True) if moves],
                [leaf for leaf, moves in zip(data, moving, strict=True) if not moves],
                {name: buffer.expand(size, *buffer.shape) for name, buffer in scratch.items()},
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the trial ran on other data, or under another setting
            raise FormUnavailable(str(error)) from error
        if any(leaf.requires_grad for leaf in pytree.tree_leaves((gradients, extra))):
            raise FormUnavailable("the loss or the model captures a tensor that requires grad")
        auxiliary.append(extra)
        if problem.differentiate:
            weights = problem.task_weights[part]
            *of_shared, of_data = gradients
            summed = [_weighted_sum(g, weights) for g in pytree.tree_leaves(of_shared)]
            sums = (
                summed if sums is None else [a.add_(b) for a, b in zip(sums, summed, strict=True)]
            )
            data_parts.append([_weighted(g, weights) for g in of_data])
    outcome = _outcome(auxiliary)
    if problem.differentiate:
        assert sums is not None
        originals = pytree.tree_leaves((problem.model.parameters(), learned))
        outcome.gradients += zip(originals, sums, strict=True)
        moved = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        parts = [torch.cat(column) for column in zip(*data_parts, strict=True)]
        outcome.gradients += zip(moved, parts, strict=True)
    return outcome


def _task_function(
    problem: Problem, spec: pytree.TreeSpec, moving: list[bool], body: Body | None
) -> Callable[..., Any]:
    """One task: `(gradients, (step_losses, support_losses, [query_output], adapted))`."""
    inner = problem.inner

    def descend(
        phi: Any, theta: Any, state: Any, learned: Any, support_loss: Any, step: int
    ) -> Any:
        rates, rule = learned
        here = {name: phi[name] for name in inner.adapted}
        gradients, loss = grad_and_value(lambda adapted: support_loss({**phi, **adapted}))(here)
        if inner.first_order:
            gradients = _detached(gradients)
        gradients = with_prox(problem, rule, gradients, state, here, theta, step)
        rates = inner.rates_at(rates, step)
        there, state = stepped(problem, rule, gradients, state, here, rates, step)
        return {**phi, **there}, state, loss

    def meta_loss(theta: Any, learned: Any, moved: Any, fixed: Any, scratch: Any) -> Any:
        given, kept = iter(moved), iter(fixed)
        leaves = [next(given) if moves else next(kept) for moves in moving]
        sets = pytree.tree_unflatten(leaves, spec)
        support, query = sets[0], sets[-1]
        support_model, query_model = _models(problem, body, theta, moved)

        def support_loss(phi: Any, step: int) -> Tensor:
            # All else is closed over: an argument would be another tensor at every step.
            inputs, targets, weights = set_at(problem, support, step)
            prediction = support_model(phi, inputs, scratch)
            return problem.objective(prediction, targets, weights[0] if weights else None)

        if body is not None and inner.steps:
            # Outside the inner gradient, whose tensors end with it.
            with torch.enable_grad():
                support_model(theta, support[0], scratch)
        rates, options = learned
        learned = {**inner.fixed_rates(), **rates}, one_task(inner.rule_with(options))
        phi, state = theta, learned[1].init({name: theta[name] for name in inner.adapted})
        step_losses: list[Tensor | None] = []
        support_losses: list[Tensor] = []
        total = output = None
        for step in range(inner.steps + 1):
            loss = None
            if problem.evaluates(step):
                inputs, targets, weights = query
                output = query_model(phi, inputs, scratch)
                loss = problem.query_objective(output, targets, weights[0] if weights else None)
                worth = inner.step_weights[step] * loss
                total = worth if total is None else total + worth
            step_losses.append(loss)
            if step < inner.steps:
                own_loss = partial(support_loss, step=step)
                phi, state, loss = descend(phi, theta, state, learned, own_loss, step)
                support_losses.append(loss)
        losses = filled(step_losses, support_losses)
        adapted = {name: phi[name] for name in inner.adapted} if problem.keep_adapted else {}
        outputs = [] if output is None else [output]
        total = losses[0].sum() if total is None else total
        return total, (*losses, outputs, adapted)

    if problem.differentiate:
        return grad(meta_loss, argnums=(0, 1, 2), has_aux=True)
    return lambda *args: ([], meta_loss(*args)[1])


def _models(
    problem: Problem, body: Body | None, theta: dict[str, Tensor], moved: Iterable[Tensor]
) -> tuple[Model, Model]:
    """The models that the passes over support and query set call."""
    if body is None:
        return problem.model, problem.model
    adapted = set(problem.inner.adapted)
    leaves = [*(p for name, p in theta.items() if name not in adapted), *moved]
    return Kept(body, leaves, cut=False), Kept(body, leaves, cut=False)


def _outcome(auxiliary: list[Any]) -> Outcome:
    step_losses, support_losses, outputs, adapted = zip(*auxiliary, strict=True)
    joined = map_tensors(lambda *parts: torch.cat(parts), *outputs)
    return Outcome(
        step_losses=torch.cat(step_losses).T,
        support_losses=torch.cat(support_losses).T,
        query_outputs=joined[0] if joined else None,
        adapted=map_tensors(lambda *parts: torch.cat(parts), *adapted),
    )


def _detached(tree: Any) -> Any:
    return map_tensors(Tensor.detach, tree)


def _optional(weights: Tensor | None) -> list[Tensor]:
    return [] if weights is None else [weights]


def _weighted(gradient: Tensor, weights: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (gradient.dim() - 1)
    return gradient * weights.to(gradient.dtype).view(shape)


def _weighted_sum(gradient: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(gradient.device.type, enabled=False):
        return torch.tensordot(weights.to(gradient.dtype), gradient, dims=1)
