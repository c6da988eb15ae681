"""The step as one launch of Triton: one program a task works through a table of operations."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import packing, rates
from fastmeta.executors.fused.lowering import Recipe
from fastmeta.executors.fused.operations import data
from fastmeta.executors.fused.operations.layout import Layout, Sizes
from fastmeta.executors.fused.operations.sweep import table
from fastmeta.executors.fused.operations.views import View
from fastmeta.executors.problem import Outcome, Problem
from fastmeta.executors.triton_device import on_host
from fastmeta.inner_loop import SHARED, InnerLoop


@dataclass(frozen=True, eq=False)
class _Program:
    """The table, on every device where it was needed, and where the data lies that it works on."""

    layout: Layout
    operations: Tensor
    numbers: Tensor
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict[torch.device, tuple[Tensor, Tensor]]
    )

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table's integers and its numbers."""
        if device not in self._on_device:
            self._on_device[device] = self.operations.to(device), self.numbers.to(device)
        return self._on_device[device]


@dataclass(frozen=True, eq=False)
class TritonKernel:
    """The table for a recipe, sizes and options, and where its data lies."""

    recipe: Recipe
    program: _Program
    bytes_each: int

    @property
    def layout(self) -> Layout:
        """Of its buffer."""
        return self.program.layout

    @property
    def names(self) -> tuple[str | None, ...]:
        """Of its tensors: weight, bias, scale and shift of each layer."""
        return self.recipe.names()

    @property
    def executor(self) -> str:
        """As results report it."""
        return "fused-triton-on-host" if on_host() else "fused-triton"

    @property
    def storage_bytes(self) -> int:
        """Of the buffer of all tasks."""
        return self.layout.space.size * self.bytes_each

    @property
    def group(self) -> tuple[int, int, float]:
        """It takes all tasks at once; how long that takes nobody has measured."""
        return self.layout.sizes.tasks, self.storage_bytes, 0.0

    @property
    def body_flops(self) -> int:
        """No layer is run once for all steps."""
        return 0

    @property
    def words(self) -> str:
        """The kernel, for `explain`."""
        return f"Triton, one program a task, {len(self.program.operations)} operations"

    def run(self, problem: Problem) -> Outcome:
        """Computes the step; `declines` must have found nothing."""
        layout, sizes, like = self.layout, self.layout.sizes, problem.task_weights
        buffer = like.new_empty(layout.space.size)
        torch.cat(self._given(problem), out=buffer[: layout.data_size])
        kernels: Any = importlib.import_module("fastmeta.kernels.launch")
        kernels.step(buffer, *self.program.on(like.device), sizes.tasks)
        packed = like.new_empty(layout.gradients)
        if problem.differentiate:
            share = layout.share
            kernels.sum_tasks(packed, buffer, like.contiguous(), share.offset, share.task)
        named = problem.model.all_parameters()
        results = buffer[layout.results_start : layout.results_end].clone()
        outcome = self._outcome(results, named)
        if problem.differentiate:
            outcome.gradients = packing.gradients(problem, self.names, packed)
        return outcome

    def _given(self, problem: Problem) -> list[Tensor]:
        """The data that begins the buffer, in the layout's order."""
        like, tasks, inner = problem.task_weights, problem.tasks, problem.inner
        named = problem.model.all_parameters()
        found: dict[str, Tensor] = {
            "constants": _numbers((0.0, 1.0), like.device, like.dtype),
            "rates": self._rates(inner, named, like),
            "step weights": _numbers(inner.step_weights, like.device, like.dtype),
            **{name: named[name].detach() for name in self.names if name},
            **data.of_set("support", tasks.support, self.recipe),
        }
        if tasks.query:
            found |= data.of_set("query", tasks.query, self.recipe)
        of_norms = packing.statistics(problem, self.recipe.norms())
        for i in range(len(self.recipe.layers)):
            mean, inverse = of_norms[2 * i : 2 * i + 2]
            if mean is not None and inverse is not None:
                found[f"statistics {i}"] = torch.stack([mean, inverse])
        empty = like.new_empty(0)
        return [found.get(name, empty).reshape(-1) for name in self.layout.given]

    def _rates(self, inner: InnerLoop, named: dict[str, Tensor], like: Tensor) -> Tensor:
        number = inner.rates.get(SHARED)
        if isinstance(number, float):
            return like.new_full((inner.steps, len(self.names)), number)
        return rates.packed(inner, named, self.names, like)

    def _outcome(self, results: Tensor, named: dict[str, Tensor]) -> Outcome:
        """The results, cut out of their copy, so that none keeps the buffer alive."""
        layout, sizes = self.layout, self.layout.sizes

        def cut(view: View, *shape: int) -> Tensor:
            start = view.offset - layout.results_start
            return results[start : start + math.prod(shape)].view(shape)

        outputs = layout.outputs
        return Outcome(
            cut(layout.step_losses, sizes.steps + 1, sizes.tasks),
            cut(layout.support_losses, sizes.steps, sizes.tasks),
            cut(outputs, sizes.tasks, outputs.rows, outputs.cols) if sizes.query else None,
            adapted={
                name: cut(view, sizes.tasks, *named[name].shape)
                for name, view in layout.adapted.items()
            },
        )


def kernel(problem: Problem, recipe: Recipe) -> TritonKernel:
    """The kernel for this problem's sizes and options."""
    inner, tasks = problem.inner, problem.tasks
    sizes = Sizes(
        tasks.tasks,
        tasks.support.count,
        tasks.query.count if tasks.query else 0,
        inner.steps,
        inner.adapted,
        tuple(problem.evaluates(k) for k in range(inner.steps + 1)),
        problem.differentiate,
        inner.first_order,
        rates.elementwise(inner),
        problem.differentiate and bool(inner.learned_rates()),
        problem.keep_adapted,
        inner.prox,
    )
    # The weights of a loss are no part of a recipe's identity, nor of a program.
    return TritonKernel(recipe, _program(recipe, sizes), problem.task_weights.element_size())


@functools.lru_cache(maxsize=64)
def _program(recipe: Recipe, sizes: Sizes) -> _Program:
    layout = Layout(recipe, sizes)
    return _Program(layout, *table(layout).tensors())


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)
