"""From a step's arguments to its plan: all is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmeta import inner_loop as loops
from fastmeta.inner_loop import InnerLoop
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned
from fastmeta.tasks import (
    RaggedTasks,
    TaskBatch,
    check_model_dtype,
    map_tensors,
    support_batch,
    task_batch,
)

_EXECUTORS = ("auto", "fused", "layered", "generic")
_MEMORY = ("auto", "low")


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """A step's checked arguments, and the plan of every batch that its tasks fall into."""

    tasks: TaskBatch | RaggedTasks
    inner: InnerLoop
    task_weights: Tensor
    groups: list[tuple[list[int], Planned]]
    """The indices of the caller's tasks in each batch, and its plan."""


def plan_step(
    model: nn.Module,
    support: Any,
    query: Any,
    *,
    inner_lr: Any,
    inner_steps: int,
    loss_fn: Callable[[Any, Any], Tensor],
    adapt: Any = None,
    first_order: bool = False,
    step_weights: Any = None,
    task_weights: Any = None,
    prox: float = 0.0,
    memory: str = "auto",
    executor: str = "auto",
    differentiate: bool = True,
) -> PlannedStep:
    """Checks the arguments of `maml_step` and plans it; without a `query`, the inner loop alone.

    **Raises** `TypeError` or `ValueError` naming the argument; nothing is changed then.
    """
    _check_choices(loss_fn, memory, executor)
    tasks = support_batch(support) if query is None else task_batch(support, query)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"model: {name} is not initialised yet (a lazy module); run the model once first"
            )
    inner = loops.inner_loop(
        parameters,
        inner_lr,
        inner_steps,
        adapt=adapt,
        step_weights=step_weights,
        prox=prox,
        first_order=first_order,
    )
    weights = loops.task_weights(task_weights, tasks.tasks, parameters)

    def prepare(indices: list[int], batch: TaskBatch) -> Planned:
        for label, examples in zip(("support", "query"), batch.sets(), strict=False):
            check_model_dtype(examples, label, parameters)
            if isinstance(tasks, TaskBatch):
                break  # support and query were found to agree
        whole = len(indices) == tasks.tasks
        return planner.prepare(
            model,
            loss_fn,
            batch,
            inner,
            weights.detach() if whole else weights.detach()[indices],
            differentiate=differentiate,
            low_memory=memory == "low",
            executor=executor,
        )

    everyone = list(range(tasks.tasks))
    if isinstance(tasks, TaskBatch):
        return PlannedStep(tasks, inner, weights, [(everyone, prepare(everyone, tasks))])
    groups = [(indices, prepare(indices, batch)) for indices, batch in tasks.by_size()]
    if len(groups) > 1 and groups[0][1].plan.maskable and planner.still_reads(groups[0][1]):
        padded = prepare(everyone, tasks.padded())
        # Only a batched form gains from padding; the loop takes each task at its own size.
        if padded.choice.form in ("vmap", "fused"):
            groups = [(everyone, padded)]
    return PlannedStep(tasks, inner, weights, groups)


def plain_module(model: Any) -> nn.Module:
    """The module itself, out of `torch.compile`; **raises** where it can't be stepped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a {type(model).__name__}; it must be an nn.Module")
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        model = original
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model: already inside DistributedDataParallel, whose hooks miss the meta-gradient; "
            "wrap it the other way round, DistributedDataParallel(fastmeta.MAML(model))"
        )
    return model


def outside_inference(data: Any) -> Any:
    """Copies of inference tensors, which autograd can't save; call outside inference mode."""
    if data is None:
        return None
    return map_tensors(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf,
        data,
    )


def _check_choices(loss_fn: Any, memory: str, executor: str) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: a {type(loss_fn).__name__}; it must be callable")
    for label, value, known in (("memory", memory, _MEMORY), ("executor", executor, _EXECUTORS)):
        if value not in known:
            raise ValueError(f"{label}: {value!r}; it must be one of {', '.join(map(repr, known))}")
    if executor == "layered":
        raise ValueError(
            f"executor: {executor!r} can't serve, it is not part of this version; "
            "use 'auto' or 'generic'"
        )
