"""Reptile (Nichol, Achiam and Schulman 2018): the model moves towards the adapted parameters.

With tasks t, weights w_t, and theta_K,t what task t adapts to, the gradient is::

    sum_t w_t (theta - theta_K,t)

so that any optimizer of torch is the outer one; the paper's outer step of size epsilon is
`torch.optim.SGD(model.parameters(), lr=epsilon)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.adaptation import run_inner_loop
from fastmeta.algorithms.learner import Learner
from fastmeta.arguments import plain_module
from fastmeta.inner import InnerOptimizer
from fastmeta.modes import outermost
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.result import MetaStep, weighted_sum, with_gradients


def reptile_step(
    model: nn.Module,
    support: Any,
    *,
    inner_lr: Rates = 0.01,
    inner_steps: int = 1,
    inner_optimizer: InnerOptimizer | None = None,
    loss_fn: Loss = F.cross_entropy,
    adapt: Adapt = None,
    prox: float = 0.0,
    task_weights: Any = None,
    per_step_support: bool = False,
    executor: str = "auto",
) -> MetaStep:
    """One step of Reptile over a batch of tasks: no query sets, and no second derivative.

    Each task takes `inner_steps` steps from the model's parameters; `out.loss.backward()` adds
    `sum_t task_weights[t] * (theta - theta_K,t)` to `.grad` of what adapts, and nothing to the
    rest: frozen parameters, learning rates and weights get no gradient. The model is not changed.

    **Arguments:** as in `maml_step`. With `per_step_support=True` each inner step has a mini-batch
    of its own, `[T, K, N, ...]`, as in the paper.

    **Returns:** a `MetaStep`. `loss` and `task_losses` are of the support sets before each task's
    last inner step; there are no `query_outputs`.

    **Raises:** `TypeError` or `ValueError` naming the argument, before anything is computed; also
    where `inner_steps` is 0, which moves nothing.

    **Source:** Nichol, Achiam and Schulman (2018), On first-order meta-learning algorithms.
    """
    options = Options(
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        loss_fn=loss_fn,
        adapt=adapt,
        prox=prox,
        task_weights=task_weights,
        per_step_support=per_step_support,
        executor=executor,
    )
    return take_step(model, support, options)


@outermost
def take_step(model: nn.Module, support: Any, options: Options) -> MetaStep:
    """`reptile_step`, of options that stand together."""
    if options.inner_steps == 0:
        raise ValueError("inner_steps: 0, which moves no parameter; it must be at least 1")
    model = plain_module(model)
    differentiate = torch.is_grad_enabled()
    with planner.stepping(model) as seen:
        with torch.no_grad():
            adapted = run_inner_loop(model, seen, support, options)
        step, task_losses = adapted.step, adapted.support_losses
        weights = step.task_weights.detach()
        loss = weighted_sum(weights, task_losses[-1])
        if differentiate:
            loss = with_gradients(loss, _differences(seen.parameters, adapted.parameters, weights))
    return MetaStep(loss, task_losses[-1], None, task_losses, step.executor)


def _differences(
    parameters: dict[str, nn.Parameter], adapted: dict[str, Tensor], weights: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Each parameter that adapts with `sum_t w_t (theta - theta_K,t)`; nothing of others."""
    return [
        (leaf, weighted_sum(weights, leaf.detach() - adapted[name]))
        for name, leaf in parameters.items()
        if name in adapted
    ]


class Reptile(Learner):
    """A model with its inner loop: `reptile(support)` is `reptile_step` with these options.

    **Arguments:** as in `reptile_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: Rates = 0.01,
        inner_steps: int = 1,
        inner_optimizer: InnerOptimizer | None = None,
        loss_fn: Loss = F.cross_entropy,
        adapt: Adapt = None,
        prox: float = 0.0,
        per_step_support: bool = False,
        executor: str = "auto",
    ) -> None:
        super().__init__(
            model, inner_lr, inner_steps, inner_optimizer, loss_fn, adapt, prox, per_step_support,
            executor,
        )  # fmt: skip

    def forward(
        self, support: Any, *, task_weights: Any = None, inner_steps: int | None = None
    ) -> MetaStep:
        """`reptile_step` on one batch of tasks; `inner_steps` overrides the module's own."""
        return take_step(self.model, support, self.options(inner_steps, task_weights=task_weights))
