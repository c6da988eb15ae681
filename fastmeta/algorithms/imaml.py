"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019): the meta-gradient at the inner optimum.

With theta_K near the minimum of `L_support + prox / 2 |theta - theta_0|^2`, H the Hessian of the
support loss there and g the gradient of the query loss, the meta-gradient by what adapts is::

    (I + H / prox)^-1 g

as in the paper, found by conjugate gradients from zero. How theta_K was reached does not
matter, so that memory does not grow with the number of inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.adaptation import run_inner_loop
from fastmeta.algorithms.learner import Learner
from fastmeta.arguments import plain_module, point_request, sized_tasks
from fastmeta.executors.linearized import Linearized, Tensors
from fastmeta.inner import InnerOptimizer
from fastmeta.modes import outermost
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.result import MetaStep, weighted_sum, with_gradients
from fastmeta.tasks import Examples, TaskBatch, Tree, map_tensors
from fastmeta.wording import a_kind


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitStep(MetaStep):
    """What `imaml_step` gives back."""

    residuals: Tensor
    """[cg_steps + 1, T]: `|g - (I + H / prox) x| / |g|` before and after each step of conjugate
    gradients; empty where no gradient was asked for."""


def imaml_step(
    model: nn.Module,
    support: Any,
    query: Any,
    *,
    prox: float,
    cg_steps: int = 5,
    inner_lr: Rates = 0.01,
    inner_steps: int = 1,
    inner_optimizer: InnerOptimizer | None = None,
    loss_fn: Loss = F.cross_entropy,
    query_loss_fn: Loss | None = None,
    adapt: Adapt = None,
    task_weights: Any = None,
    per_step_support: bool = False,
    executor: str = "auto",
) -> ImplicitStep:
    """One step of implicit MAML over a batch of tasks, in memory that is flat in `inner_steps`.

    Each task minimises its support loss plus `prox / 2 |theta - theta_0|^2` and is evaluated on its
    query set; the meta-gradient is the exact one of a task that has reached the minimum, but for
    what conjugate gradients leave (`residuals`). `out.loss.backward()` adds it to `.grad` of every
    trainable parameter: one that does not adapt gets the query loss's own gradient, and what it
    does to the minimum. Learning rates, weights, inputs and what the losses capture get none: the
    minimum does not depend on how it was reached. The model is not changed.

    **Arguments:** as in `maml_step`, and

    - `prox`: the strength of the proximal term, above 0. A small one lets tasks go far, and needs
        more steps of conjugate gradients.
    - `cg_steps`: steps of conjugate gradients, at least 0; 0 is the query gradient itself.
    - `per_step_support`: the Hessian is of the last inner step's support set.

    **Returns:** an `ImplicitStep`: a `MetaStep` with the `residuals`.

    **Raises:** `TypeError` or `ValueError` naming the argument, before anything is computed.

    **Source:** Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients.
    """
    options = Options(
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        loss_fn=loss_fn,
        query_loss_fn=query_loss_fn,
        adapt=adapt,
        prox=prox,
        task_weights=task_weights,
        per_step_support=per_step_support,
        executor=executor,
    )
    return take_step(model, support, query, options, cg_steps)


@outermost
def take_step(
    model: nn.Module, support: Any, query: Any, options: Options, cg_steps: int
) -> ImplicitStep:
    """`imaml_step`, of options that stand together."""
    _check(options, cg_steps)
    if query is None:
        raise TypeError("query: None; it must be (x, y). For the inner loop alone, use adapt()")
    model = plain_module(model)
    differentiate = torch.is_grad_enabled()
    with planner.stepping(model) as seen, torch.no_grad():
        groups = sized_tasks(seen, support, query, options)
        adapted = run_inner_loop(model, seen, support, options)
        step, weights = adapted.step, adapted.step.task_weights.detach()
        leaves = {name: p for name, p in seen.parameters.items() if p.requires_grad}

        def linearized(examples: Examples, loss: Loss, at: Tensors, targets: str) -> Linearized:
            tasks = TaskBatch(examples, None)
            return planner.linearize(point_request(model, seen, tasks, loss, targets), at)

        found: list[_Implicit] = []
        for indices, tasks in groups:
            assert tasks.query is not None
            at = {
                name: adapted.parameters[name][indices]
                if name in adapted.parameters
                else p.detach().expand(len(indices), *p.shape)
                for name, p in leaves.items()
            }
            of_loss, of_query_loss = options.losses()
            of_query = linearized(tasks.query, of_query_loss, at, "query_y")
            solved = _Solved({}, at[step.inner.adapted[0]].new_zeros(0, len(indices)))
            if differentiate:
                last = tasks.support_at(max(0, step.inner.steps - 1))
                of_support = linearized(last, of_loss, at, "support_y")
                moving = step.inner.adapted
                solved = _solve(of_support, of_query, at, moving, options.prox, cg_steps)
            found.append(_Implicit(indices, of_query, solved))
    return _implicit_step(found, leaves, weights, adapted.support_losses, step.executor)


def _check(options: Options, cg_steps: Any) -> None:
    prox: Any = options.prox
    if isinstance(prox, bool) or not isinstance(prox, (int, float)):
        raise TypeError(f"prox: {a_kind(prox)}; it must be a number")
    if not prox > 0 or prox == float("inf"):
        raise ValueError(f"prox: {prox!r}; it must be above 0 and finite")
    if isinstance(cg_steps, bool) or not isinstance(cg_steps, int):
        raise TypeError(f"cg_steps: {a_kind(cg_steps)}; it must be an integer")
    if cg_steps < 0:
        raise ValueError(f"cg_steps: {cg_steps}; it must be at least 0")


@dataclass(frozen=True, eq=False)
class _Solved:
    gradients: Tensors
    """By trainable parameter, `[T, ...]`."""
    residuals: Tensor
    """[cg_steps + 1, T]."""


@dataclass(frozen=True, eq=False)
class _Implicit:
    """What was found of tasks of one size."""

    indices: list[int]
    of_query: Linearized
    solved: _Solved


def _solve(
    of_support: Linearized, of_query: Linearized, at: Tensors, moving: tuple[str, ...],
    prox: float, cg_steps: int,
) -> _Solved:  # fmt: skip
    """Conjugate gradients for `(I + H / prox) x = g`, a step size for each task.

    A task whose residual is nothing stays where it is. The vectors are as large as all tasks'
    parameters: they are written in place.
    """
    still = {name: torch.zeros_like(p) for name, p in at.items() if name not in moving}
    x = {name: torch.zeros_like(at[name]) for name in moving}
    gradients = of_query.gradients
    r = {name: gradients[name].clone() if name in gradients else x[name].clone() for name in moving}
    p = {name: each.clone() for name, each in r.items()}
    a = {name: torch.empty_like(each) for name, each in r.items()}
    start = squared = _dot(r, r)
    residuals = [torch.ones_like(start)]
    for _ in range(cg_steps):
        product = of_support.product({**still, **p})
        for name, out in a.items():
            if name in product:
                torch.add(p[name], product[name], alpha=1 / prox, out=out)
            else:
                out.copy_(p[name])
        size = _ratio(squared, _dot(p, a))
        before = squared
        _add(x, size, p)
        _add(r, -size, a)
        squared = _dot(r, r)
        factors = _ratio(squared, before)
        for name, each in p.items():
            torch.addcmul(r[name], _beside(factors, each), each, out=each)
        residuals.append(_ratio(squared, start).sqrt())
    if still:
        mixed = of_support.product({**still, **x})
        for name, nothing in still.items():
            direct = gradients.get(name, nothing)
            still[name] = direct - mixed[name] / prox if name in mixed else direct
    return _Solved({**still, **x}, torch.stack(residuals))


def _dot(a: Tensors, b: Tensors) -> Tensor:
    """[T]: the inner products of two vectors a task."""
    # No product of matrices, which autocast would round.
    return torch.stack([(a[n] * b[n]).flatten(1).sum(1) for n in a]).sum(0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """`above / below`; 0 where there is nothing to divide."""
    return torch.where((above == 0) | (below == 0), torch.zeros_like(above), above / below)


def _add(a: Tensors, factors: Tensor, b: Tensors) -> None:
    """`a += factors * b`, a factor a task."""
    for name, each in a.items():
        each.addcmul_(_beside(factors, each), b[name])


def _beside(factors: Tensor, like: Tensor) -> Tensor:
    """`[T]` as `[T, 1, ...]`."""
    return factors.view(-1, *(1,) * (like.dim() - 1))


def _implicit_step(
    found: list[_Implicit], leaves: Mapping[str, nn.Parameter], weights: Tensor,
    support_losses: Tensor, executor: str,
) -> ImplicitStep:  # fmt: skip
    """The step of all tasks, in the order of the caller's."""
    order = [i for each in found for i in each.indices]
    places = torch.tensor(order, device="cpu").argsort().to(weights.device)
    task_losses = torch.cat([each.of_query.losses for each in found])[places]
    residuals = torch.cat([each.solved.residuals for each in found], dim=1)[:, places]
    outputs: Tree = found[0].of_query.outputs
    if len(found) > 1:
        of_tasks: list[Tree] = [None] * len(order)
        for each in found:
            for row, index in enumerate(each.indices):
                of_tasks[index] = map_tensors(lambda y, row=row: y[row], each.of_query.outputs)
        outputs = of_tasks
    loss = with_gradients(
        weighted_sum(weights, task_losses),
        (
            (leaves[name], weighted_sum(weights[each.indices], gradient))
            for each in found
            for name, gradient in each.solved.gradients.items()
        ),
    )
    return ImplicitStep(loss, task_losses, outputs, support_losses, executor, residuals)


class IMAML(Learner):
    """A model with its inner loop: `imaml(support, query)` is `imaml_step` with these options.

    **Arguments:** as in `imaml_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prox: float,
        cg_steps: int = 5,
        inner_lr: Rates = 0.01,
        inner_steps: int = 1,
        inner_optimizer: InnerOptimizer | None = None,
        loss_fn: Loss = F.cross_entropy,
        query_loss_fn: Loss | None = None,
        adapt: Adapt = None,
        per_step_support: bool = False,
        executor: str = "auto",
    ) -> None:
        super().__init__(
            model, inner_lr, inner_steps, inner_optimizer, loss_fn, adapt, prox, per_step_support,
            executor,
        )  # fmt: skip
        self.query_loss_fn = query_loss_fn
        self.cg_steps = cg_steps
        _check(self.options(), cg_steps)

    def forward(
        self, support: Any, query: Any, *, task_weights: Any = None, inner_steps: int | None = None
    ) -> ImplicitStep:
        """`imaml_step` on one batch of tasks; `inner_steps` overrides the module's own."""
        options = self.options(
            inner_steps, query_loss_fn=self.query_loss_fn, task_weights=task_weights
        )
        return take_step(self.model, support, query, options, self.cg_steps)
