"""The arguments `support` and `query`: checked, and given one shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.tasks import Examples, RaggedTasks, TaskBatch, Tree, map_tensors, per_step_batch
from fastmeta.wording import a_kind


def task_batch(
    support: Any, query: Any, steps: int | None = None, same_targets: bool = True
) -> TaskBatch | RaggedTasks:
    """Checks `(x, y)` data and gives it one shape.

    With `steps`, support leaves are `[T, K, N, ...]` with so many inner steps K. `same_targets`:
    whether support and query have targets of one structure and dtype.

    **Raises** `TypeError` or `ValueError` that names the argument, before anything is computed.
    """
    ragged = _is_ragged(support)
    if ragged != _is_ragged(query):
        raise TypeError(
            "support and query: one is a list with a pair per task, the other is not; "
            "both need the same form"
        )
    if ragged:
        return _ragged_tasks(support, query, steps, same_targets)
    both = _examples("support", support, steps), _examples("query", query)
    if both[0].tasks != both[1].tasks:
        raise ValueError(
            f"query_x: {both[1].tasks} tasks, but support_x has {both[0].tasks}; "
            "both need the same leading dimension"
        )
    _agree(*both, same_targets)
    return TaskBatch(*both) if steps is None else per_step_batch(*both)


def tensor_batch(support: Any, query: Any) -> TaskBatch | None:
    """The batch of two pairs of tensors `[T, N, ...]`, unchecked; None for data of another form."""
    pairs = (support,) if query is None else (support, query)
    for pair in pairs:
        if type(pair) not in (tuple, list) or len(pair) != 2:
            return None
        for leaf in pair:
            if not isinstance(leaf, Tensor) or leaf.dim() < 2:
                return None
    sets = [Examples(x, y, *x.shape[:2]) for x, y in pairs]
    return TaskBatch(sets[0], None if query is None else sets[1])


def support_batch(support: Any, steps: int | None = None) -> TaskBatch | RaggedTasks:
    """The same for support sets alone."""
    if _is_ragged(support):
        return _ragged_tasks(support, None, steps)
    examples = _examples("support", support, steps)
    return TaskBatch(examples, None) if steps is None else per_step_batch(examples, None)


def check_inputs(name: str, inputs: Tree, tasks: int) -> int:
    """Checks that every leaf is `[T, N, ...]` with this T and returns N."""
    leaves = [(f"{name}{path}", leaf) for path, leaf in _named_leaves(inputs)]
    if not leaves:
        raise ValueError(f"{name}: holds no tensor; it must be [T, N, ...] or a tree of such")
    sizes = _leading(leaves)
    if sizes[0] != tasks:
        raise ValueError(f"{name}: {sizes[0]} tasks, but {tasks} were adapted")
    return sizes[1]


def check_model_dtype(batch: Examples, label: str, parameters: Mapping[str, Tensor]) -> None:
    """Inputs must stand on the parameters' device, float inputs in their dtype."""
    devices = {p.device for p in parameters.values()}
    dtypes = {p.dtype for p in parameters.values()}
    if len(devices) != 1:
        return
    (device,) = devices
    for path, leaf in _named_leaves(batch.inputs):
        if leaf.device != device:
            raise ValueError(
                f"{label}_x{path}: on {leaf.device}, but the model's parameters are on {device}; "
                f"move one of them with .to({str(device)!r})"
            )
        if len(dtypes) == 1 and leaf.is_floating_point() and not _autocasts(device):
            (dtype,) = dtypes
            if leaf.dtype != dtype:
                raise TypeError(
                    f"{label}_x{path}: {_name(leaf.dtype)}, but the model's parameters are "
                    f"{_name(dtype)}; convert one of them with .to(torch.{_name(dtype)})"
                )
    for path, leaf in _named_leaves(batch.targets):
        if leaf.device != device:
            raise ValueError(
                f"{label}_y{path}: on {leaf.device}, but the model's parameters are on {device}; "
                f"move it with .to({str(device)!r})"
            )


def _is_ragged(data: Any) -> bool:
    return (
        isinstance(data, list)
        and len(data) > 0
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in data)
    )


def _examples(name: str, data: Any, steps: int | None = None) -> Examples:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(
            f"{name}: {_describe(data)}; it must be a pair (x, y) with leading [T, N], "
            "or a list with one (x, y) pair for each task"
        )
    inputs, targets = data
    inputs_named = [(f"{name}_x{path}", leaf) for path, leaf in _named_leaves(inputs)]
    targets_named = [(f"{name}_y{path}", leaf) for path, leaf in _named_leaves(targets)]
    if not inputs_named or not targets_named:
        which = "x" if not inputs_named else "y"
        raise ValueError(f"{name}_{which}: holds no tensor")
    tasks, count = _leading(inputs_named + targets_named)
    if tasks == 0 or count == 0:
        what = "tasks" if tasks == 0 else "examples"
        raise ValueError(
            f"{name}_x: no {what} (shape {_shape(inputs_named[0][1])}); at least one is needed"
        )
    if steps is not None:
        _check_steps(inputs_named + targets_named, steps)
    return Examples(inputs, targets, tasks, count)


def _check_steps(named: Sequence[tuple[str, Any]], steps: int) -> None:
    """Checks that every leaf has a support set for each inner step."""
    first_name, first = named[0]
    for name, leaf in named:
        if leaf.dim() < 3:
            raise ValueError(
                f"{name}: shape {_shape(leaf)}; with per_step_support it must have tasks, inner "
                "steps and examples in front, [T, K, N, ...]"
            )
        if leaf.shape[1] != steps:
            raise ValueError(
                f"{name}: {leaf.shape[1]} support sets a task, but inner_steps is {steps}; with "
                "per_step_support each inner step has one, [T, K, N, ...]"
            )
        if leaf.shape[2] != first.shape[2] or not leaf.shape[2]:
            raise ValueError(
                f"{name}: {leaf.shape[2]} examples, but {first_name} has {first.shape[2]}; both "
                "need the same [T, K, N] in front, and at least one example"
            )


def _named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    if isinstance(tree, Tensor):
        return [("", tree)]
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [(pytree.keystr(path), leaf) for path, leaf in pairs]


def _leading(named: Sequence[tuple[str, Any]]) -> tuple[int, int]:
    """The `[T, N]` that every leaf has in front."""
    first_name, first = named[0]
    for name, leaf in named:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: {_describe(leaf)}; it must be a tensor")
        if leaf.dim() < 2:
            raise ValueError(
                f"{name}: shape {_shape(leaf)}; it must have tasks and examples in front, "
                "[T, N, ...]"
            )
        for axis, what in ((0, "tasks"), (1, "examples")):
            if leaf.shape[axis] != first.shape[axis]:
                raise ValueError(
                    f"{name}: {leaf.shape[axis]} {what}, but {first_name} has "
                    f"{first.shape[axis]}; both need the same [T, N] in front"
                )
    return first.shape[0], first.shape[1]


def _agree(support: Examples, query: Examples, same_targets: bool) -> None:
    """Support and query go through one model: same structure, dtypes and devices."""
    parts = [("x", support.inputs, query.inputs), ("y", support.targets, query.targets)]
    for part, left, right in parts if same_targets else parts[:1]:
        left_named, right_named = _named_leaves(left), _named_leaves(right)
        if [path for path, _ in left_named] != [path for path, _ in right_named]:
            raise ValueError(
                f"query_{part}: entries {[p for p, _ in right_named]}, but support_{part} has "
                f"{[p for p, _ in left_named]}; both need the same structure"
            )
        for (path, s), (_, q) in zip(left_named, right_named, strict=True):
            if s.dtype != q.dtype:
                raise TypeError(
                    f"query_{part}{path}: {_name(q.dtype)}, but support_{part}{path} is "
                    f"{_name(s.dtype)}; both need the same dtype"
                )
            if s.device != q.device:
                raise ValueError(
                    f"query_{part}{path}: on {q.device}, but support_{part}{path} is on "
                    f"{s.device}; both need the same device"
                )


def _ragged_tasks(
    support: list[Any], query: list[Any] | None, steps: int | None = None, same_targets: bool = True
) -> RaggedTasks:
    if query is not None and len(support) != len(query):
        raise ValueError(
            f"query: {len(query)} tasks, but support has {len(support)}; "
            "both lists need one pair for each task"
        )
    for name, pairs in (("support", support), ("query", query or [])):
        reference: list[tuple[str, Tensor]] | None = None
        for i, pair in enumerate(pairs):
            x, y = pair
            own = steps if name == "support" else None
            label = f"{name}[{i}]"
            _examples(label, (_lift(label, x), _lift(label, y)), own)
            leaves = _named_leaves((x, y))
            reference = reference or leaves
            for (path, leaf), (_, first) in zip(leaves, reference, strict=True):
                front = 1 if own is None else 2
                if leaf.shape[front:] != first.shape[front:] or leaf.dtype != first.dtype:
                    raise ValueError(
                        f"{name}[{i}]{path}: examples of shape {_shape(leaf)[front:]} and dtype "
                        f"{_name(leaf.dtype)}, but task 0 has {_shape(first)[front:]} and "
                        f"{_name(first.dtype)}; only the number of examples may differ"
                    )
    pairs = None if query is None else _as_pairs(query)
    return RaggedTasks(_as_pairs(support), pairs, steps is not None)


def _as_pairs(listed: list[Any]) -> list[tuple[Tree, Tree]]:
    return [(x, y) for x, y in listed]


def _lift(name: str, tree: Tree) -> Tree:
    for path, leaf in _named_leaves(tree):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}{path}: {_describe(leaf)}; it must be a tensor")
    return map_tensors(lambda leaf: leaf.unsqueeze(0), tree)


def _autocasts(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {_shape(value)}"
    if isinstance(value, (tuple, list)):
        return f"{a_kind(value)} of {len(value)}"
    return f"{a_kind(value)}"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
