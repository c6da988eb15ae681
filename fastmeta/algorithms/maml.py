"""MAML (Finn, Abbeel and Levine 2017): tasks adapt by gradient steps; the loss after them counts.

With tasks t, weights w_t, inner rates a_k, and theta_0 the model's parameters::

    theta_{k+1} = theta_k - a_k * gradient of (L_support + prox / 2 |theta - theta_0|^2) at theta_k
    loss = sum_t w_t sum_k step_weights[k] * L_query(theta_k)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.algorithms.learner import Learner
from fastmeta.arguments import PlannedStep, plain_module, plan_step
from fastmeta.capture import Captured
from fastmeta.executors.problem import Outcome
from fastmeta.inner import InnerOptimizer
from fastmeta.inner_loop import adapted_names, check_rate
from fastmeta.modes import outermost
from fastmeta.network.errors import refuse_second_derivative
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned
from fastmeta.result import MetaStep, weighted_sum, with_gradients
from fastmeta.tasks import TaskBatch, Tree
from fastmeta.wording import a_kind

LEARNED = ("scalar", "step", "layer", "layer-step", "element")


def maml_step(
    model: nn.Module,
    support: Any,
    query: Any,
    *,
    inner_lr: Rates = 0.01,
    inner_steps: int = 1,
    inner_optimizer: InnerOptimizer | None = None,
    loss_fn: Loss = F.cross_entropy,
    query_loss_fn: Loss | None = None,
    first_order: bool = False,
    adapt: Adapt = None,
    step_weights: Any = None,
    task_weights: Any = None,
    prox: float = 0.0,
    per_step_support: bool = False,
    memory: str = "auto",
    executor: str = "auto",
) -> MetaStep:
    """One step of MAML over a batch of tasks: loss and meta-gradient in one pass.

    Each task starts from the model's parameters, takes `inner_steps` gradient steps on its support
    set and is evaluated on its query set. `out.loss.backward()` adds the gradient of that
    evaluation, second order included, to `.grad` of every tensor that reaches it and requires grad:
    parameters, learning rates, weights, inputs, and what loss or model capture.

    The model is not changed: neither its parameters nor its buffers (running statistics).

    **Arguments:**

    - `model`: any `nn.Module`. Parameters with `requires_grad=False` stay frozen. Not one wrapped
        in `DistributedDataParallel`: wrap `fastmeta.MAML(model)` instead.
    - `support`: `(x, y)` with leading `[T, N]`. `x` may be a tuple (`model(*x)`) or a dict
        (`model(**x)`). For tasks of different sizes, a list with one `(x, y)` a task, each with
        leading `[N]`.
    - `query`: the same with leading `[T, Q]`.
    - `inner_lr`: a number, finite and not negative, or 0-d tensor; `[K]`, one per step; or a dict
        by parameter name with entries 0-d, of the parameter's number of dimensions (elementwise),
        or of one more, with K in front. Tensors that require grad get their gradient. The values
        of tensors are taken as they are: to read them would wait for a GPU, and a rate that is
        learned may turn negative.
    - `inner_steps`: K, at least 0.
    - `inner_optimizer`: the update rule of the inner loop: an optimizer of `fastmeta.inner`
        (`SGD`, `Adam`, `AdamW`, `RMSprop`), begun anew for each task, or a rule of your own; None
        is gradient descent. Tensors among its options that require grad get their gradient.
    - `loss_fn`: `loss_fn(prediction, target)`, a 0-d mean over the examples of one task. The
        default is for classification: labels, or probabilities of classes.
    - `query_loss_fn`: the loss on the query sets, called as `loss_fn` is; None is `loss_fn`. With
        it, query targets may differ from the support's in dtype and structure.
    - `first_order`: take the inner gradients as constants (first-order MAML).
    - `adapt`: what the inner loop moves: None for every trainable parameter, a name or module
        prefix, several of them, or a predicate `(name, parameter) -> bool`.
    - `step_weights`: `[K + 1]` weights of the query loss before the first and after each step
        (MAML++'s multi-step loss); None evaluates after the last alone.
    - `task_weights`: `[T]`; None is the mean over tasks.
    - `prox`: adds `prox / 2 * |phi - theta|^2` to the inner objective.
    - `per_step_support`: True where each inner step has a support set of its own: support leaves
        are `[T, K, N, ...]`, and step k uses `[:, k]`.
    - `memory`: `"auto"` is the fastest; `"low"` keeps peak memory flat in K, but for K
        parameter sets or, on the fused kernels, activations of a few MB.
    - `executor`: `"auto"`, `"fused"`, `"layered"` or `"generic"`; one that can't serve raises.

    **Returns:**

    A `MetaStep`. Under `torch.no_grad()` or `torch.inference_mode()` the loss alone is computed.

    **Raises:**

    `TypeError` or `ValueError`, before anything is computed or changed, naming the argument.

    **Source:** Finn, Abbeel and Levine (2017), Model-agnostic meta-learning.
    """
    options = Options(
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        inner_optimizer=inner_optimizer,
        loss_fn=loss_fn,
        query_loss_fn=query_loss_fn,
        first_order=first_order,
        adapt=adapt,
        step_weights=step_weights,
        task_weights=task_weights,
        prox=prox,
        per_step_support=per_step_support,
        memory=memory,
        executor=executor,
    )
    return take_step(model, support, query, options)


@outermost
def take_step(
    model: nn.Module,
    support: Any,
    query: Any,
    options: Options,
    compute: Callable[[Planned], Outcome] = planner.compute,
) -> MetaStep:
    """`maml_step`, of which `compute` makes what was planned."""
    if query is None:
        raise TypeError("query: None; it must be (x, y). For the inner loop alone, use adapt()")
    model = plain_module(model)
    differentiate = torch.is_grad_enabled()
    with planner.stepping(model) as seen:
        step = plan_step(model, seen, support, query, options, differentiate)
        try:
            outcomes = [(indices, compute(planned)) for indices, planned in step.groups]
        except NotImplementedError as error:
            refuse_second_derivative(model, error)
            raise
    return _meta_step(step, outcomes)


def _meta_step(step: PlannedStep, outcomes: list[tuple[list[int], Outcome]]) -> MetaStep:
    weights = step.task_weights
    step_losses, support_losses, query_outputs = _in_order(step, outcomes)
    if step.inner.last_step_alone:
        task_losses = step_losses[-1]  # [T]
    else:
        task_losses = weighted_sum(step_losses.new_tensor(step.inner.step_weights), step_losses)
    loss = weighted_sum(weights.detach(), task_losses)
    pairs = [pair for _, outcome in outcomes for pair in outcome.gradients]
    if pairs:
        learned = step.inner.learned_step_weights
        if learned is not None:
            of_steps = weighted_sum(weights.detach(), step_losses.T)
            pairs.append((learned, of_steps.to(learned.dtype)))
        if weights.requires_grad:
            pairs.append((weights, task_losses.to(weights.dtype)))
        loss = with_gradients(loss, pairs)
    return MetaStep(loss, task_losses, query_outputs, support_losses, step.executor)


def _in_order(
    step: PlannedStep, outcomes: list[tuple[list[int], Outcome]]
) -> tuple[Tensor, Tensor, Tree]:
    """Losses and outputs of all groups, in the order of the caller's tasks."""
    tasks = step.tasks
    if isinstance(tasks, TaskBatch):
        ((_, outcome),) = outcomes
        return outcome.step_losses, outcome.support_losses, outcome.query_outputs
    order = [index for indices, _ in outcomes for index in indices]
    outputs: list[Tree] = [None] * tasks.tasks
    for indices, outcome in outcomes:
        for position, index in enumerate(indices):
            outputs[index] = tasks.cut_query(outcome.query_outputs, position, index)
    step_losses = torch.cat([outcome.step_losses for _, outcome in outcomes], dim=1)
    support_losses = torch.cat([outcome.support_losses for _, outcome in outcomes], dim=1)
    places = torch.tensor(order, device="cpu").argsort().to(step_losses.device)
    return step_losses[:, places], support_losses[:, places], outputs


class MAML(Learner):
    """A model with its inner loop: `maml(support, query)` is `maml_step` with these options.

    To outgrow one device, wrap it: `DistributedDataParallel(fastmeta.MAML(model))`; each rank takes
    its share of the tasks.

    **Arguments:** as in `maml_step`, and

    - `inner_optimizer`: parameters among its options, and of a rule that is a module, are learned.
    - `learn_inner_lr`: which learning rates become parameters, all starting from the number
        `inner_lr`: `"scalar"` (one), `"step"` (one per step), `"layer"` (one per parameter tensor),
        `"layer-step"` (one per parameter tensor and step: LSLR of MAML++, Antoniou et al. 2019),
        `"element"` (one per parameter element: Meta-SGD, Li et al. 2017). None: `inner_lr` as it
        is; an `nn.Parameter` given as `inner_lr` (or in its dict) is registered.
    - `capture`: whether a step by the CUDA kernels, or by Triton's layers, is recorded as a CUDA
        graph, for each shape of the data once, and replayed from then on. Where that can't be, a
        warning says why, once, and steps run as they do otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: Rates = 0.01,
        inner_steps: int = 1,
        inner_optimizer: InnerOptimizer | None = None,
        loss_fn: Loss = F.cross_entropy,
        query_loss_fn: Loss | None = None,
        learn_inner_lr: str | None = None,
        first_order: bool = False,
        adapt: Adapt = None,
        step_weights: Any = None,
        prox: float = 0.0,
        per_step_support: bool = False,
        memory: str = "auto",
        executor: str = "auto",
        capture: bool = False,
    ) -> None:
        if learn_inner_lr is not None:
            model = plain_module(model)
            inner_lr = _learned(model, inner_lr, learn_inner_lr, inner_steps, adapt)
        super().__init__(
            model, inner_lr, inner_steps, inner_optimizer, loss_fn, adapt, prox, per_step_support,
            executor,
        )  # fmt: skip
        self._compute = Captured().compute if capture else planner.compute
        self.query_loss_fn = query_loss_fn
        self.first_order = first_order
        self.step_weights = step_weights
        self.memory = memory

    def forward(
        self, support: Any, query: Any, *, task_weights: Any = None, inner_steps: int | None = None
    ) -> MetaStep:
        """`maml_step` on one batch of tasks; `inner_steps` overrides the module's own."""
        options = self.options(
            inner_steps,
            query_loss_fn=self.query_loss_fn,
            first_order=self.first_order,
            step_weights=self.step_weights,
            task_weights=task_weights,
            memory=self.memory,
        )
        return take_step(self.model, support, query, options, self._compute)

    def extra_repr(self) -> str:
        """The options that differ most from run to run."""
        return f"inner_steps={self.inner_steps}, first_order={self.first_order}"


def _learned(model: nn.Module, inner_lr: Any, kind: str, inner_steps: int, adapt: Adapt) -> Any:
    """Rates that are parameters, all starting from one number."""
    if kind not in LEARNED:
        raise ValueError(
            f"learn_inner_lr: {kind!r}; it must be None or one of {', '.join(map(repr, LEARNED))}"
        )
    if isinstance(inner_lr, bool) or not isinstance(inner_lr, (int, float)):
        raise TypeError(
            f"inner_lr: {a_kind(inner_lr)}; with learn_inner_lr={kind!r} it is the "
            "number that every rate starts from"
        )
    check_rate("inner_lr", inner_lr)
    parameters = dict(model.named_parameters())
    names = adapted_names(parameters, adapt)

    def rate(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(
            torch.full(shape, float(inner_lr), dtype=like.dtype, device=like.device)
        )

    first = parameters[names[0]]
    if kind == "scalar":
        return rate(first, ())
    if kind == "step":
        return rate(first, (inner_steps,))
    shapes = {
        "layer": lambda p: (),
        "layer-step": lambda p: (inner_steps, *(1,) * p.dim()),
        "element": lambda p: tuple(p.shape),
    }[kind]
    return {name: rate(parameters[name], shapes(parameters[name])) for name in names}
