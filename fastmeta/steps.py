"""The meta-step: arguments in, loss and meta-gradient out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.arguments import PlannedStep, outside_inference, plain_module, plan_step
from fastmeta.executors.problem import Outcome
from fastmeta.inner import InnerOptimizer
from fastmeta.network.errors import refuse_second_derivative
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned
from fastmeta.tasks import TaskBatch, Tree


@dataclass(frozen=True, eq=False)
class MetaStep:
    """What a meta-step gives back.

    Only `loss` is differentiable; the rest is detached. Symbols: T tasks, Q query examples,
    K inner steps.
    """

    loss: Tensor
    """0-d: `sum_t task_weights[t] * task_losses[t]`. `backward()` adds the meta-gradient."""
    task_losses: Tensor
    """[T]: each task's query loss, weighted over steps by `step_weights`."""
    query_outputs: Tree
    """[T, Q, ...]: the adapted models' predictions; a list with one entry a task if ragged."""
    support_losses: Tensor
    """[K, T]: the support loss before each inner step, without the proximal term."""
    executor: str
    """What computed the step, for example `"generic"`."""

    def __repr__(self) -> str:
        loss, tasks = self.loss.detach(), len(self.task_losses)
        return f"MetaStep(loss={loss}, tasks={tasks}, executor={self.executor!r})"


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


def take_step(
    model: nn.Module,
    support: Any,
    query: Any,
    options: Options,
    compute: Callable[[Planned], Outcome] = planner.compute,
) -> MetaStep:
    """`maml_step`, of which `compute` makes what was planned."""
    if torch.compiler.is_compiling():
        # A graph break: the inner loop differentiates twice, which no compiled graph can.
        outside: Any = torch.compiler.disable(take_step)
        return outside(model, support, query, options, compute)
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            data = outside_inference(support), outside_inference(query)
            return take_step(model, *data, options, compute)
    if _in_transform():
        raise RuntimeError(
            "model: stepped inside a transform of torch.func, which sees nothing of a step; call "
            "backward() on its loss, outside"
        )
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


def _in_transform() -> bool:
    """Whether one of torch.func's transforms is at work."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def _meta_step(step: PlannedStep, outcomes: list[tuple[list[int], Outcome]]) -> MetaStep:
    weights = step.task_weights
    step_losses, support_losses, query_outputs = _in_order(step, outcomes)
    if step.inner.last_step_alone:
        task_losses = step_losses[-1]  # [T]
    else:
        task_losses = _weighted_sum(step_losses.new_tensor(step.inner.step_weights), step_losses)
    loss = _weighted_sum(weights.detach(), task_losses)
    pairs = [pair for _, outcome in outcomes for pair in outcome.gradients]
    if pairs:
        learned = step.inner.learned_step_weights
        if learned is not None:
            of_steps = _weighted_sum(weights.detach(), step_losses.T)
            pairs.append((learned, of_steps.to(learned.dtype)))
        if weights.requires_grad:
            pairs.append((weights, task_losses.to(weights.dtype)))
        reached = [(leaf, gradient) for leaf, gradient in pairs if gradient is not None]
        if reached:
            leaves, gradients = zip(*reached, strict=True)
            # A leaf that several groups of tasks reach stands there several times; autograd adds.
            loss = _MetaGradient.apply(loss, gradients, *leaves)
    executors = sorted({planned.selected.offer.executor for _, planned in step.groups})
    return MetaStep(loss, task_losses, query_outputs, support_losses, "+".join(executors))


_EXACT = (torch.float32, torch.float64)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """`weights [N]` times `values [N, ...]`, summed; no matrix product, which autocast rounds."""
    if values.dim() == 1 and weights.dtype == values.dtype in _EXACT:
        return torch.dot(weights, values)
    shape = (-1,) + (1,) * (values.dim() - 1)
    return (weights.to(values.dtype).view(shape) * values).sum(0)


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


class _MetaGradient(torch.autograd.Function):
    """A loss whose gradients are known already; `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, scale: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(ctx.saved_tensors, scale)
        if torch.is_grad_enabled():  # create_graph=True
            anchor = torch.zeros((), requires_grad=True)
            scaled = [_NoThirdOrder.apply(g, anchor) for g in scaled]
        return (None, None, *scaled)


class _NoThirdOrder(torch.autograd.Function):
    """A meta-gradient that refuses to be differentiated once more, rather than be a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(
            "the meta-gradient of fastmeta is differentiable once: a loss made of it (a gradient "
            "penalty, a third level) has no gradient here"
        )
