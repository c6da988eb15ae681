"""A batch of tasks: the data of one meta-step, in one shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
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
    """That of the first inner step, where each has its own."""
    query: Examples | None
    """None where only the inner loop is asked for."""
    per_step: Examples | None = None
    """The support sets of all inner steps, leaves `[T, K, N, ...]`, where each has its own."""

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support.tasks

    @property
    def rounded(self) -> int:
        """T rounded up to four binary digits, by which executors are chosen."""
        return rounded(self.tasks)

    def support_at(self, step: int) -> Examples:
        """The support set of an inner step."""
        return self.support if self.per_step is None else _at_step(self.per_step, step)

    @cached_property
    def signature(self) -> Hashable:
        """All that checks and plans read of the data but its numbers and T.

        None where its trees hold more than tensors, or these disagree about T.
        """
        tasks = self.tasks
        known: list[Hashable] = [self.per_step is not None]
        specs: list[Hashable] = []
        for examples in self.sets():
            known.append(examples.weights is None)
            for tree in (examples.inputs, examples.targets):
                leaves: Sequence[Any] = (tree,)
                if not isinstance(tree, Tensor):
                    leaves, spec = pytree.tree_flatten(tree)
                    specs.append(spec)
                for leaf in leaves:
                    if not isinstance(leaf, Tensor) or not leaf.dim():
                        return None
                    shape = leaf.shape
                    if shape[0] != tasks:
                        return None
                    known += (type(leaf), shape[1:], leaf.dtype, leaf.device, leaf.requires_grad)
        if not specs:
            return tuple(known) if tasks else None
        try:
            hash(found := (*known, *specs))
        except TypeError:  # of a container that is registered with torch
            return None
        return found if tasks else None

    def sets(self) -> list[Examples]:
        """Support, and query where there is one."""
        return [self.support] if self.query is None else [self.support, self.query]

    def given(self) -> list[Examples]:
        """The sets as the caller gave them, with all inner steps' support in one."""
        return [self.per_step or self.support, *self.sets()[1:]]

    def mapped(self, function: Callable[[Examples], Examples]) -> TaskBatch:
        """The batch with another set in place of each."""
        rest = (each and function(each) for each in (self.query, self.per_step))
        return TaskBatch(function(self.support), *rest)

    def first(self, count: int) -> TaskBatch:
        """The first `count` tasks, as views."""
        return self.mapped(lambda examples: _narrow(examples, count))

    def of_steps(self, steps: int) -> TaskBatch:
        """The same with the support sets of the first inner steps alone."""
        if self.per_step is None:
            return self
        trees = map_tensors(lambda leaf: leaf[:, :steps], _trees(self.per_step))
        return replace(self, per_step=replace(self.per_step, inputs=trees[0], targets=trees[1]))

    def shortened(self, count: int) -> TaskBatch:
        """The first `count` examples of each task, as views; all where examples are padded."""
        if self.per_step is not None:
            query = self.query and _shorten(self.query, count, 1)
            return per_step_batch(_shorten(self.per_step, count, 2), query)
        return self.mapped(lambda examples: _shorten(examples, count, 1))


@dataclass(frozen=True, eq=False)
class RaggedTasks:
    """Tasks of different sizes, as the caller listed them: one `(x, y)` pair a task and set."""

    support: list[tuple[Tree, Tree]]
    query: list[tuple[Tree, Tree]] | None
    per_step: bool = False
    """Whether each inner step has a support set of its own, leaves `[K, N, ...]`."""

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return len(self.support)

    def by_size(self) -> list[tuple[list[int], TaskBatch]]:
        """Tasks that share their sizes, stacked: `[(indices, batch), ...]`."""
        sets = [self.support] if self.query is None else [self.support, self.query]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pairs in enumerate(zip(*sets, strict=True)):
            shapes = [pytree.tree_leaves(pair)[0].shape for pair in pairs]
            sizes = tuple(
                shape[1 if self.per_step and axis == 0 else 0] for axis, shape in enumerate(shapes)
            )
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
        support, query = make(self.support), None if self.query is None else make(self.query)
        return per_step_batch(support, query) if self.per_step else TaskBatch(support, query)


def per_step_batch(support: Examples, query: Examples | None) -> TaskBatch:
    """The batch of support leaves `[T, K, N, ...]`."""
    whole = replace(support, count=pytree.tree_leaves(support.inputs)[0].shape[2])
    return TaskBatch(_at_step(whole, 0), query, whole)


def _trees(examples: Examples) -> tuple[Tree, Tree]:
    return examples.inputs, examples.targets


def _at_step(examples: Examples, step: int) -> Examples:
    inputs, targets = map_tensors(lambda leaf: leaf[:, step], _trees(examples))
    return Examples(inputs, targets, examples.tasks, examples.count)


def rounded(count: int) -> int:
    """The number rounded up to four binary digits."""
    digits = max(0, count.bit_length() - 4)
    return -(-count >> digits) << digits


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


def _stack(pairs: list[tuple[Tree, Tree]]) -> Examples:
    inputs, targets = pytree.tree_map(lambda *leaves: torch.stack(leaves), pairs[0], *pairs[1:])
    return Examples(inputs, targets, len(pairs), pytree.tree_leaves(inputs)[0].shape[1])


def _pad(pairs: list[tuple[Tree, Tree]]) -> Examples:
    first = [pytree.tree_leaves(inputs)[0] for inputs, _ in pairs]
    counts = torch.tensor([leaf.shape[0] for leaf in first], device="cpu")  # [T]
    longest = int(counts.max())
    position = torch.arange(longest, device="cpu")  # [N]
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
    inputs, targets = pytree.tree_map(lambda leaf: leaf[:count], _trees(examples))
    weights = None if examples.weights is None else examples.weights[:count]
    return Examples(inputs, targets, min(count, examples.tasks), examples.count, weights)


def _shorten(examples: Examples, count: int, axis: int) -> Examples:
    if examples.weights is not None or examples.count <= count:
        return examples
    inputs, targets = pytree.tree_map(lambda leaf: leaf.narrow(axis, 0, count), _trees(examples))
    return Examples(inputs, targets, examples.tasks, count)
