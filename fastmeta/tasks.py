"""A batch of tasks: the data of one meta-step, checked and in one shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
"""A tensor, or tuples, lists and dicts of tensors."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The support or the query set of every task.

    `weights` is None where every example is real; otherwise `[T, N]`, each task's row summing to
    one over its real examples and zero on the padding.
    """

    inputs: Tree  # leaves [T, N, ...]
    targets: Tree  # leaves [T, N, ...]
    tasks: int
    count: int
    weights: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """Every tensor of the set, inputs first."""
        if isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor):
            return [self.inputs, self.targets]
        return pytree.tree_leaves((self.inputs, self.targets))


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Tasks of one size: `T` tasks of `N` support and `Q` query examples."""

    support: Examples
    query: Examples | None
    """None where only the inner loop is asked for."""

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support.tasks

    @cached_property
    def signature(self) -> Hashable:
        """All that checks and plans read of the data but its numbers; None if it is in trees."""
        known: list[Hashable] = []
        for examples in self.sets():
            if not isinstance(examples.inputs, Tensor) or not isinstance(examples.targets, Tensor):
                return None
            known.append(examples.weights is None)
            for leaf in (examples.inputs, examples.targets):
                known += (type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
        return tuple(known)

    def sets(self) -> list[Examples]:
        """Support, and query where there is one."""
        return [self.support] if self.query is None else [self.support, self.query]

    def first(self, count: int) -> TaskBatch:
        """The first `count` tasks, as views."""
        query = None if self.query is None else _narrow(self.query, count)
        return TaskBatch(_narrow(self.support, count), query)

    def shortened(self, count: int) -> TaskBatch:
        """The first `count` examples of each task, as views; all where examples are padded."""
        query = None if self.query is None else _shorten(self.query, count)
        return TaskBatch(_shorten(self.support, count), query)


@dataclass(frozen=True, eq=False)
class RaggedTasks:
    """Tasks of different sizes, as the caller listed them: one `(x, y)` pair a task and set."""

    support: list[tuple[Tree, Tree]]
    query: list[tuple[Tree, Tree]] | None

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.support)

    def by_size(self) -> list[tuple[list[int], TaskBatch]]:
        """Tasks that share their sizes, stacked: `[(indices, batch), ...]`."""
        sets = [self.support] if self.query is None else [self.support, self.query]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pairs in enumerate(zip(*sets, strict=True)):
            sizes = tuple(pytree.tree_leaves(pair)[0].shape[0] for pair in pairs)
            groups.setdefault(sizes, []).append(i)
        return [
            (indices, self._batch(lambda pairs, chosen=indices: _stack([pairs[i] for i in chosen])))
            for indices in groups.values()
        ]

    def cut_query(self, outputs: Tree, position: int, task: int) -> Tree:
        """Row `position` of batched outputs, cut to the query examples that this task has."""
        assert self.query is not None
        count = pytree.tree_leaves(self.query[task])[0].shape[0]
        return map_tensors(lambda output: output[position, :count], outputs)

    def padded(self) -> TaskBatch:
        """All tasks in one batch: short sets repeat their last example at weight zero."""
        return self._batch(_pad)

    def _batch(self, make: Callable[[list[tuple[Tree, Tree]]], Examples]) -> TaskBatch:
        return TaskBatch(make(self.support), None if self.query is None else make(self.query))


def task_batch(support: Any, query: Any) -> TaskBatch | RaggedTasks:
    """Checks `(x, y)` data and gives it one shape.

    **Raises** `TypeError` or `ValueError` that names the argument, before anything is computed.
    """
    ragged = _is_ragged(support)
    if ragged != _is_ragged(query):
        raise TypeError(
            "support and query: one is a list with a pair per task, the other is not; "
            "both need the same form"
        )
    if ragged:
        return _ragged_tasks(support, query)
    both = _examples("support", support), _examples("query", query)
    if both[0].tasks != both[1].tasks:
        raise ValueError(
            f"query_x: {both[1].tasks} tasks, but support_x has {both[0].tasks}; "
            "both need the same leading dimension"
        )
    _agree(*both)
    return TaskBatch(*both)


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


def support_batch(support: Any) -> TaskBatch | RaggedTasks:
    """The same for support sets alone."""
    if _is_ragged(support):
        return _ragged_tasks(support, None)
    return TaskBatch(_examples("support", support), None)


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


def detached(tree: Tree) -> Tree:
    """A model's output off the tape: tensors detached, plain values kept, other objects None."""
    plain = (bool, int, float, str, type(None))
    return pytree.tree_map(
        lambda leaf: (
            leaf.detach() if isinstance(leaf, Tensor) else leaf if isinstance(leaf, plain) else None
        ),
        tree,
    )


def unstack(tree: Tree, tasks: int) -> list[Tree]:
    """One tree a task from a tree with leading T."""
    if isinstance(tree, Tensor):
        return list(tree.unbind(0))
    leaves, spec = pytree.tree_flatten(tree)
    columns = [leaf.unbind(0) for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in columns], spec) for i in range(tasks)]


def map_tensors(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`function` on every tensor of a tree; what is no tensor stays."""
    if isinstance(tree, Tensor):
        return function(tree, *rest)
    return pytree.tree_map(
        lambda leaf, *others: function(leaf, *others) if isinstance(leaf, Tensor) else leaf,
        tree,
        *rest,
    )


def stacked(trees: list[Tree]) -> Tree:
    """One tree with leading T out of one a task; None out of Nones."""
    if trees[0] is None:
        return None
    return map_tensors(lambda *leaves: torch.stack(leaves), *trees)


def _is_ragged(data: Any) -> bool:
    return (
        isinstance(data, list)
        and len(data) > 0
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in data)
    )


def _examples(name: str, data: Any) -> Examples:
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
    return Examples(inputs, targets, tasks, count)


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


def _agree(support: Examples, query: Examples) -> None:
    """Support and query go through one model: same structure, dtypes and devices."""
    for part, left, right in (
        ("x", support.inputs, query.inputs),
        ("y", support.targets, query.targets),
    ):
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


def _ragged_tasks(support: list[Any], query: list[Any] | None) -> RaggedTasks:
    if query is not None and len(support) != len(query):
        raise ValueError(
            f"query: {len(query)} tasks, but support has {len(support)}; "
            "both lists need one pair for each task"
        )
    for name, pairs in (("support", support), ("query", query or [])):
        reference: list[tuple[str, Tensor]] | None = None
        for i, pair in enumerate(pairs):
            x, y = pair
            _examples(f"{name}[{i}]", (_lift(f"{name}[{i}]", x), _lift(f"{name}[{i}]", y)))
            leaves = _named_leaves((x, y))
            reference = reference or leaves
            for (path, leaf), (_, first) in zip(leaves, reference, strict=True):
                if leaf.shape[1:] != first.shape[1:] or leaf.dtype != first.dtype:
                    raise ValueError(
                        f"{name}[{i}]{path}: examples of shape {_shape(leaf)[1:]} and dtype "
                        f"{_name(leaf.dtype)}, but task 0 has {_shape(first)[1:]} and "
                        f"{_name(first.dtype)}; only the number of examples may differ"
                    )
    return RaggedTasks(_as_pairs(support), None if query is None else _as_pairs(query))


def _as_pairs(listed: list[Any]) -> list[tuple[Tree, Tree]]:
    return [(x, y) for x, y in listed]


def _lift(name: str, tree: Tree) -> Tree:
    for path, leaf in _named_leaves(tree):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}{path}: {_describe(leaf)}; it must be a tensor")
    return map_tensors(lambda leaf: leaf.unsqueeze(0), tree)


def _stack(pairs: list[tuple[Tree, Tree]]) -> Examples:
    inputs, targets = pytree.tree_map(lambda *leaves: torch.stack(leaves), pairs[0], *pairs[1:])
    return Examples(inputs, targets, len(pairs), pytree.tree_leaves(inputs)[0].shape[1])


def _pad(pairs: list[tuple[Tree, Tree]]) -> Examples:
    first = [pytree.tree_leaves(inputs)[0] for inputs, _ in pairs]
    counts = torch.tensor([leaf.shape[0] for leaf in first])  # [T]
    longest = int(counts.max())
    position = torch.arange(longest)  # [N]
    starts = counts.cumsum(0) - counts  # [T]
    rows = (starts[:, None] + torch.minimum(position[None], counts[:, None] - 1)).flatten()
    real = position[None] < counts[:, None]  # [T, N]

    def gather(*leaves: Tensor) -> Tensor:
        flat = torch.cat(leaves).index_select(0, rows.to(leaves[0].device))
        return flat.unflatten(0, (len(leaves), longest))

    inputs, targets = pytree.tree_map(gather, pairs[0], *pairs[1:])
    # In float64, so that a loss in any dtype loses nothing by them.
    weights = (real.double() / counts[:, None]).to(first[0].device)
    return Examples(inputs, targets, len(pairs), longest, weights)


def _narrow(examples: Examples, count: int) -> Examples:
    inputs, targets = pytree.tree_map(
        lambda leaf: leaf[:count], (examples.inputs, examples.targets)
    )
    weights = None if examples.weights is None else examples.weights[:count]
    return Examples(inputs, targets, min(count, examples.tasks), examples.count, weights)


def _shorten(examples: Examples, count: int) -> Examples:
    if examples.weights is not None or examples.count <= count:
        return examples
    inputs, targets = pytree.tree_map(
        lambda leaf: leaf[:, :count], (examples.inputs, examples.targets)
    )
    return Examples(inputs, targets, examples.tasks, count)


def _autocasts(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {_shape(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
