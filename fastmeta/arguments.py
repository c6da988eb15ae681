"""From a step's arguments to its plan: all is checked here, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fastmeta import inner_loop as loops
from fastmeta import mistakes
from fastmeta.executors import packing
from fastmeta.inner import SGD, Adam, AdamW, RMSprop
from fastmeta.inner_loop import InnerLoop
from fastmeta.network.errors import refuse_unready
from fastmeta.options import Loss, Options
from fastmeta.plan import planner
from fastmeta.plan.planner import Planned, Request
from fastmeta.plan.snapshot import Snapshot
from fastmeta.task_arguments import check_model_dtype, support_batch, task_batch, tensor_batch
from fastmeta.tasks import RaggedTasks, TaskBatch, map_tensors
from fastmeta.wording import a_kind

_EXECUTORS = ("auto", "fused", "layered", "generic")
_MEMORY = ("auto", "low")
_PLAIN = frozenset((float, int, bool, str, type(None), SGD, Adam, AdamW, RMSprop))


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """A step's checked arguments, and the plan of every batch that its tasks fall into."""

    tasks: TaskBatch | RaggedTasks
    inner: InnerLoop
    task_weights: Tensor
    groups: list[tuple[list[int], Planned]]
    """The indices of the caller's tasks in each batch, and its plan."""

    @property
    def executor(self) -> str:
        """What computes it, by name."""
        names = {planned.selected.offer.executor for _, planned in self.groups}
        return "+".join(sorted(names))


def linearize_request(model: nn.Module, seen: Snapshot, data: Any, options: Options) -> Request:
    """The checked arguments of `linearize`; **raises** as `plan_step` does."""
    _check_choices(options)
    check_setting(model, seen, {"data": data})
    tasks = _tasks(seen, data, None, options)
    if not isinstance(tasks, TaskBatch):
        raise TypeError("data: a list with one pair a task; linearize takes tasks of one size")
    return point_request(model, seen, tasks, options.loss_fn, "data")


def point_request(
    model: nn.Module, seen: Snapshot, tasks: TaskBatch, loss_fn: Loss, targets: str
) -> Request:
    """A request for what a loss on the support sets is near one point a task.

    `targets`: what the caller calls theirs.
    """
    options = Options(loss_fn=loss_fn, inner_steps=0)
    inner = _inner_loop(seen, options)
    weights = _weights(seen, None, tasks.tasks)
    weights = weights.detach()
    return Request(model, seen, options, tasks, inner, weights, True, targets=(targets,))


def sized_tasks(
    seen: Snapshot, support: Any, query: Any, options: Options
) -> list[tuple[list[int], TaskBatch]]:
    """The checked data in batches of tasks of one size, each with the indices of its tasks."""
    _check_choices(options)
    tasks = _tasks(seen, support, query, options)
    if not isinstance(tasks, TaskBatch):
        return tasks.by_size()
    return [([*range(tasks.tasks)], tasks)]


def plan_step(
    model: nn.Module,
    seen: Snapshot,
    support: Any,
    query: Any,
    options: Options,
    differentiate: bool,
) -> PlannedStep:
    """Check the arguments of `maml_step` and plan it; without a `query`, the inner loop alone.

    **Raises** `TypeError` or `ValueError` naming the argument; nothing is changed then.
    """
    _check_choices(options)
    check_setting(model, seen, {"support": support, "query": query})
    tasks = _tasks(seen, support, query, options)
    inner = _inner_loop(seen, options)
    weights = _weights(seen, options.task_weights, tasks.tasks)

    def prepare(indices: list[int], batch: TaskBatch) -> Planned:
        if not isinstance(tasks, TaskBatch):
            for label, examples in zip(("support", "query"), batch.sets(), strict=False):
                check_model_dtype(examples, label, seen.parameters)
        fixed = weights.detach()
        some = fixed if len(indices) == tasks.tasks else fixed[indices]
        request = Request(model, seen, options, batch, inner, some, differentiate)
        planned = planner.prepare(request)
        if any(map(mistakes.is_default, options.losses())):
            mistakes.refuse_one_output(planned.selected.reading.profile.prediction)
        return planned

    everyone = list(range(tasks.tasks))
    if isinstance(tasks, TaskBatch):
        planned = prepare(everyone, tasks)
        if mistakes.may_lack_tasks(tasks):
            look = mistakes.warn_of_missing_tasks
            seen.known(("no tasks", tasks.signature), lambda: look(model, options.loss_fn, tasks))
        return PlannedStep(tasks, inner, weights, [(everyone, planned)])
    groups = [(indices, prepare(indices, batch)) for indices, batch in tasks.by_size()]
    first = groups[0][1]
    maskable = not tasks.per_step and first.selected.reading.maskable
    if len(groups) > 1 and maskable and planner.still_reads(first):
        padded = prepare(everyone, tasks.padded())
        # Only a batched form gains from padding; the loop takes each task at its own size.
        if padded.selected.offer.at_a_time > 1:
            groups = [(everyone, padded)]
    return PlannedStep(tasks, inner, weights, groups)


def check_setting(model: nn.Module, seen: Snapshot, given: dict[str, Any]) -> None:
    """**Raises** where a model, or data given by name, can't be stepped or linearized."""
    refuse_cached(model)
    _refuse_meta(seen)
    if forward_ad._current_level >= 0:
        _check_tangents({**given, "model": seen.parameters})


def _tasks(seen: Snapshot, support: Any, query: Any, options: Options) -> TaskBatch | RaggedTasks:
    """The data, checked by itself, and where it is one batch against the model and its loss.

    The values of targets are looked at where data of a kind is first seen.
    """
    by_default = tuple(map(mistakes.is_default, options.losses()))
    batch = None if options.per_step_support else tensor_batch(support, query)
    if batch is None or batch.signature is None:
        tasks = _checked_tasks(seen, support, query, options)
        if any(by_default):
            first = tasks.support.targets if isinstance(tasks, TaskBatch) else tasks.support[0][1]
            kinds = tuple((leaf.dtype, leaf.shape[-1:]) for leaf in pytree.tree_leaves(first))
            seen.known(("targets", kinds), lambda: mistakes.refuse_regression(tasks, by_default))
        return tasks

    def check() -> bool:
        tasks = _checked_tasks(seen, support, query, options)
        return mistakes.refuse_regression(tasks, by_default)

    autocasts = tuple(map(torch.is_autocast_enabled, seen.devices))
    same = options.query_loss_fn is None
    seen.known(("data", batch.signature, autocasts, by_default, same), check)
    return batch


def _checked_tasks(
    seen: Snapshot, support: Any, query: Any, options: Options
) -> TaskBatch | RaggedTasks:
    steps = options.inner_steps if options.per_step_support else None
    if query is None:
        tasks = support_batch(support, steps)
    else:
        tasks = task_batch(support, query, steps, same_targets=options.query_loss_fn is None)
    if isinstance(tasks, TaskBatch):
        # Support and query were found to agree.
        check_model_dtype(tasks.support, "support", seen.parameters)
    return tasks


def _inner_loop(seen: Snapshot, options: Options) -> InnerLoop:
    given = (
        options.inner_lr, options.inner_steps, options.adapt, options.step_weights, options.prox,
        options.first_order, options.inner_optimizer,
    )  # fmt: skip
    kinds = tuple(map(type, given))
    if not _PLAIN.issuperset(kinds):
        return loops.inner_loop(seen.parameters, options)
    return seen.known((kinds, given), lambda: loops.inner_loop(seen.parameters, options))


def _weights(seen: Snapshot, weights: Any, tasks: int) -> Tensor:
    def find() -> Tensor:
        with torch.inference_mode(False):  # it outlives this call
            return loops.task_weights(None, tasks, seen.parameters)

    if weights is None:
        # A mode's tensors must not outlive it.
        return find() if packing.watched() else seen.known(("mean", tasks), find)
    found = loops.task_weights(weights, tasks, seen.parameters)
    return found.clone() if found._is_zerotensor() else found


def refuse_cached(model: nn.Module) -> None:
    """**Raises** `RuntimeError` where parametrizations would give weights that did not adapt."""
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, model.modules())):
        raise RuntimeError(
            "model: has parametrizations, and torch.nn.utils.parametrize.cached() is on, which "
            "hands out the weights of its first pass, not the adapted ones; call it outside "
            "cached()"
        )


def _refuse_meta(seen: Snapshot) -> None:
    if "meta" in seen.devices:
        raise ValueError(
            "model: has parameters on the meta device, which holds no numbers; give it some first: "
            "model.to_empty(device='cpu'), then initialise or load them"
        )


def plain_module(model: Any) -> nn.Module:
    """The module itself, out of `torch.compile`; **raises** where it can't be stepped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {a_kind(model)}; it must be an nn.Module")
    refuse_unready(model)
    if "_orig_mod" in model._modules:  # getattr would make an error's message first
        model = model._modules["_orig_mod"]
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


def _check_tangents(given: dict[str, Any]) -> None:
    for label, tree in given.items():
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
                raise ValueError(
                    f"{label}: carries a forward-mode tangent, and a step has derivatives in "
                    "reverse mode alone; call it outside dual_level()"
                )


def _check_choices(options: Options) -> None:
    for label, loss_fn in zip(("loss_fn", "query_loss_fn"), options.losses(), strict=True):
        if isinstance(loss_fn, type):
            name = loss_fn.__name__
            call = f"nn.{name}()" if getattr(nn, name, None) is loss_fn else f"{name}(...)"
            raise TypeError(f"{label}: the class {name}, not an instance of it; write {call}")
        if not callable(loss_fn):
            raise TypeError(f"{label}: {a_kind(loss_fn)}; it must be callable")
    given: Any = options.per_step_support
    if not isinstance(given, bool):
        raise TypeError(f"per_step_support: {given!r}; it must be True or False")
    for label, value, known in (
        ("memory", options.memory, _MEMORY),
        ("executor", options.executor, _EXECUTORS),
    ):
        if value not in known:
            raise ValueError(f"{label}: {value!r}; it must be one of {', '.join(map(repr, known))}")
