"""Data that computes but was hardly meant so: refused or warned of when its kind is first seen."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.stateless import StatelessModel
from fastmeta.tasks import RaggedTasks, TaskBatch, Tree
from fastmeta.warning import warn

_ROUNDING = 0.005
"""The error of each class's probability: it may be written with two digits, or in bfloat16."""
_INSTEAD = "for regression write loss_fn=torch.nn.functional.mse_loss"


def refuse_regression(tasks: TaskBatch | RaggedTasks, by_default: Sequence[bool]) -> bool:
    """True; **raises** `ValueError` for targets of which the default loss makes nonsense.

    `by_default`: whether it is that of the support and of the query sets. It reads the values of
    targets; those that require grad may leave the probabilities as they learn.
    """
    if isinstance(tasks, TaskBatch):
        labels = ("support", "query")
        for label, examples, default in zip(labels, tasks.sets(), by_default, strict=False):
            if default:
                _check_probabilities(f"{label}_y", examples.targets)
        return True
    sets = (("support", tasks.support), ("query", tasks.query or []))
    for (label, pairs), default in zip(sets, by_default, strict=True):
        for i, (_, targets) in enumerate(pairs if default else ()):
            if isinstance(targets, Tensor):
                _check_probabilities(f"{label}[{i}]_y", targets.unsqueeze(0))
    return True


def _check_probabilities(label: str, targets: Tree) -> None:
    """Checks targets `[T, N, C, ...]`; integers are labels, and checked elsewhere."""
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.requires_grad:
        return
    classes = min(2, targets.dim() - 1)
    total = targets.sum(classes, dtype=torch.promote_types(targets.dtype, torch.float32))
    rounding = _ROUNDING * targets.shape[classes]
    outside = (targets < 0).any() | (targets > 1).any() | ((total - 1).abs() > rounding).any()
    if bool(outside):
        dtype = str(targets.dtype).removeprefix("torch.")
        raise ValueError(
            f"{label}: {dtype} of shape {list(targets.shape)} that are no class probabilities, as "
            f"loss_fn, cross_entropy, takes them; {_INSTEAD}. (For soft labels that do not sum to "
            "one: loss_fn=torch.nn.CrossEntropyLoss())"
        )


def refuse_one_output(prediction: tuple[int, ...] | None) -> None:
    """Refuses predictions `[N, 1, ...]` under the default loss. **Raises** `ValueError`."""
    if prediction is not None and len(prediction) > 1 and prediction[1] == 1:
        raise ValueError(
            f"model: gives {list(prediction)}, one output an example, of which loss_fn, "
            f"cross_entropy, is always 0; {_INSTEAD}, for two classes a model with two outputs"
        )


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models of which a warning has been given."""


def may_lack_tasks(tasks: TaskBatch) -> bool:
    """Return whether `[T, N, ...]` may be `[N, features, ...]`, with equally many of the latter."""
    count, query = tasks.support.count, tasks.query
    if tasks.tasks == 1 or (query is not None and query.count != count):
        return False
    x = tasks.support.inputs
    return isinstance(x, Tensor) and (count == 1 or x.dim() == 2)


def warn_of_missing_tasks(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], tasks: TaskBatch
) -> bool:
    """True; warns, once a model, of tasks that may be the examples of one task.

    `[10, 1]` is ten tasks of one number, or ten examples of one feature. The latter is meant where
    model and loss take all of it as the examples of one task, and do not take the examples of two
    tasks as those of one: features stand in their place. Ten tasks of one number may be meant, but
    hardly ever are.
    """
    x, y = tasks.support.inputs, tasks.support.targets
    if model in _warned or not isinstance(y, Tensor) or not _takes(model, loss_fn, x, y):
        return True
    numbers = x.dim() == 2 and x.shape[1] == 1
    if numbers or not _takes(model, loss_fn, x[:2].flatten(0, 1), y[:2].flatten(0, 1)):
        _warned.add(model)
        shape = list(x.shape)
        warn(
            f"support_x: shape {shape} is read as {shape[0]} tasks of {shape[1]} examples. If it "
            f"is {shape[0]} examples of one task, put the tasks in front, in support and query: "
            "x[None], y[None]"
        )
    return True


def _takes(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor) -> bool:
    """Return whether model and loss run on one task, `x [N, ...]` and `y [N, ...]`."""
    with torch.no_grad(), same_random_numbers(x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Using a target size")
        try:
            prediction = StatelessModel(model)({}, x.detach().clone(), {})
            return loss_fn(prediction, y.detach()).dim() == 0
        except Exception:  # both are arbitrary code
            return False


def is_default(loss_fn: Any) -> bool:
    """Return whether it is the loss of those who name none."""
    return loss_fn is F.cross_entropy
