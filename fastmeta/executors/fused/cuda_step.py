"""One call of the CUDA step: addresses and a stream in, losses and gradients out.

Nothing here waits for the device, and all memory is torch's, so that a call can be captured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmeta.executors import update_rule
from fastmeta.executors.addresses import Addresses
from fastmeta.executors.call import QUERY, SUPPORT, Call
from fastmeta.executors.fused import cuda
from fastmeta.executors.fused.cuda import CudaKernel
from fastmeta.executors.fused.step import arrays, packed_rates
from fastmeta.executors.problem import Outcome, Problem


def run(problem: Problem, kernel: CudaKernel) -> Outcome:
    """Computes the step; an offer was made for its sizes.

    **Raises** `RuntimeError` where the device refuses the launch; nothing is computed then.
    """
    with cuda.guard(kernel.device), torch.no_grad():
        return _run(problem, kernel)


def _run(problem: Problem, kernel: CudaKernel) -> Outcome:
    tasks, weights = problem.tasks, problem.task_weights
    call, step, lowered = Call(problem, kernel), kernel.step, kernel.lowered
    rate = packed_rates(problem, kernel)
    support = arrays(tasks.per_step or tasks.support, lowered.loss)
    query = arrays(tasks.query, lowered.query_loss)
    options = update_rule.describe(problem.inner, problem.differentiate).options
    numbers = kernel.rule_options(options) if options else None
    first = call.parameters[0]
    assert first is not None
    # The dual form's kernel knows nothing of the first weight.
    skipped = first.numel() if step.dual else 0
    gradient = weights.new_empty(skipped + step.gradients if problem.differentiate else 0)
    products = _products(support[0], query[0], first, problem.differentiate) if step.dual else []
    partials = weights.new_empty(step.blocks * step.gradients)
    workspace = weights.new_empty(step.workspace)
    step_weights = kernel.step_weights(problem.inner.step_weights, weights.dtype)
    # The mean over tasks is kept by the plan, which may be gone when a graph runs again.
    task_weights = weights.clone() if cuda.capturing(kernel.device) else weights
    at = Addresses()
    read = (
        *call.read(at, kernel),
        at.of(rate, "inner_lr"),
        at.of(step_weights, "step_weights"),
        at.of(task_weights, "task_weights"),
        at.each(support, SUPPORT),
        at.each(query, QUERY),
        at.each(products, [""] * len(products)),
    )
    try:
        step.run(
            kernel.image.data_ptr(),
            *read,
            *call.written(),
            workspace.data_ptr(),
            partials.data_ptr(),
            gradient[skipped:].data_ptr(),
            cuda.rounds(weights.dtype),
            cuda.index(kernel.device),
            cuda.stream(kernel.device),
            at.of(numbers, "inner_optimizer"),
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"the fused step can't run on {kernel.device}: {error}; executor='generic' needs no "
            "kernels of fastmeta's"
        ) from error
    if problem.differentiate and step.dual:
        found = gradient[:skipped].view(first.shape)
        _multiply(found, support[0], query[0], products, problem.inner.first_order)
    return call.outcome(problem, kernel, gradient)


def _flat(x: Tensor | None) -> Tensor:
    """`[T, N, D]`."""
    assert x is not None
    return x.detach().reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _products(
    support: Tensor | None, query: Tensor | None, weight: Tensor, differentiate: bool
) -> list[Tensor | None]:
    """What the dual form's kernel reads, and where it leaves its cotangents.

    `X W'` `[T, N, H]` of support and query set, `X X'` `[T, N, N]`, `X_q X'` `[T, Q, N]`.
    """
    xs, xq, w = _flat(support), _flat(query), weight.detach()
    starts = [torch.matmul(xs, w.T), torch.matmul(xq, w.T)]
    left = [torch.empty_like(start) if differentiate else None for start in starts]
    return [*starts, torch.bmm(xs, xs.mT), torch.bmm(xq, xs.mT), *left]


def _multiply(
    out: Tensor,
    support: Tensor | None,
    query: Tensor | None,
    products: list[Tensor | None],
    first_order: bool,
) -> None:
    """The first weight's gradient `C_q' X_q + C_s' X` `[H, D]`; (11)."""
    of_support, of_query = products[4:]
    assert of_support is not None
    assert of_query is not None
    torch.mm(of_query.flatten(0, 1).T, _flat(query).flatten(0, 1), out=out)
    if not first_order:  # then C_s is zero
        out.addmm_(of_support.flatten(0, 1).T, _flat(support).flatten(0, 1))
