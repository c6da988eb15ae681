"""`evaluate`: how well tasks that training never saw are learned, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta.algorithms import maml
from fastmeta.algorithms.learner import Learner
from fastmeta.algorithms.prototypical import Prototypical
from fastmeta.options import Options
from fastmeta.tasks import Tree, unstack
from fastmeta.wording import a_kind

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """A metric over many tasks. Its text is a line: mean, interval, tasks, time."""

    values: Tensor
    """[tasks], float64: the metric of each."""
    seconds: float
    """A task, to adapt and to predict its query set."""
    is_accuracy: bool
    """Whether the values are shares of labels that are right."""

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return float(self.values.mean())

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of the mean: 1.96 standard errors; infinite of one task."""
        tasks = len(self.values)
        return 1.96 * float(self.values.std()) / tasks**0.5 if tasks > 1 else float("inf")

    def __repr__(self) -> str:
        scale, unit = (100, " %") if self.is_accuracy else (1, "")
        digits = 2 if self.is_accuracy else 4
        return (
            f"{scale * self.mean:.{digits}f} ± {scale * self.half_width:.{digits}f}{unit} "
            f"over {len(self.values)} tasks, {1e3 * self.seconds:.2f} ms a task"
        )


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The share of labels that are the greatest output's place; `[..., Q, C]` and `[..., Q]`."""
    return (outputs.argmax(-1) == labels).double().mean(-1)


def evaluate(
    learner: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    metric: Metric | None = None,
    inner_steps: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Adapt to the tasks of each batch and measure the predictions on their query sets.

    Nothing is changed and nothing is differentiated. Normalisation and dropout do what the model's
    mode says, as in training.

    **Arguments:**

    - `learner`: a `MAML`, `IMAML`, `Reptile` or `Prototypical` with its own options, or any
        `nn.Module`, for which `options` are those of `maml_step`.
    - `batches`: `(support, query)` pairs as `maml_step` takes them; as many as are to be evaluated.
    - `metric`: `metric(outputs, targets)` of one task's query set, a number or 0-d tensor; None is
        the accuracy, for targets that are labels.
    - `inner_steps`: K, in place of the learner's.
    - `progress`: show a bar, which takes the `rich` of `pip install "fastmeta[demo]"`.

    **Returns:** an `Evaluation`; `print` shows a line.

    **Raises:** `TypeError` or `ValueError` as `maml_step`, and where there is no batch.
    """
    compute = _computed(learner, inner_steps, options)
    if progress:
        from rich.progress import track

        total = len(batches) if isinstance(batches, Sized) else None
        batches = track(batches, "evaluating", total)
    values: list[Tensor] = []
    seconds = 0.0
    for support, query in batches:
        start = time.perf_counter()
        with torch.no_grad():
            outputs = compute(support, query)
        _wait(outputs)
        seconds += time.perf_counter() - start
        values.append(_measured(metric, outputs, query))
    if not values:
        raise ValueError("batches: there is none")
    found = torch.cat(values).cpu()
    return Evaluation(found, seconds / len(found), metric is None)


def _computed(
    learner: Any, inner_steps: int | None, options: dict[str, Any]
) -> Callable[[Any, Any], Tree]:
    """The predictions of a batch's query sets, by `(support, query)`."""
    if isinstance(learner, (Learner, Prototypical)) and options:
        name = next(iter(options))
        raise TypeError(f"{name}: the {type(learner).__name__} has its own; give it there")
    if isinstance(learner, Prototypical):
        if inner_steps is not None:
            raise TypeError("inner_steps: prototypical networks take none")
        return lambda support, query: learner(support, query).query_outputs
    if not isinstance(learner, nn.Module):
        raise TypeError(f"learner: {a_kind(learner)}; it must be an nn.Module")
    if isinstance(learner, Learner):
        others = {"query_loss_fn": getattr(learner, "query_loss_fn", None)}
        model, chosen = learner.model, learner.options(inner_steps, **others)
    else:
        model, chosen = learner, Options(**options)
        if inner_steps is not None:
            chosen = replace(chosen, inner_steps=inner_steps)
    return lambda support, query: maml.take_step(model, support, query, chosen).query_outputs


def _wait(outputs: Tree) -> None:
    """Until a device has computed them."""
    for leaf in pytree.tree_leaves(outputs)[:1]:
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            torch.accelerator.synchronize(leaf.device)


def _measured(metric: Metric | None, outputs: Tree, query: Any) -> Tensor:
    """The metric of each task of a batch, `[T]`."""
    if not isinstance(query, list):
        targets = query[1]
        if metric is None:
            _check_labels(targets)
            return accuracy(outputs, targets)
        leaves = pytree.tree_leaves(outputs)
        tasks = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        pairs = [*zip(unstack(outputs, tasks), unstack(targets, tasks), strict=True)]
    else:
        pairs = [*zip(outputs, [y for _, y in query], strict=True)]
    if metric is None:
        for _, labels in pairs:
            _check_labels(labels)
    each = [(metric or accuracy)(output, target) for output, target in pairs]
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in each])


def _check_labels(targets: Any) -> None:
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        raise TypeError(
            "metric: None is the accuracy of labels, and the targets are none; give one"
        )
