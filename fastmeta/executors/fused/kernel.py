"""The compiled step for a recipe, sizes and options, and how data is packed for it."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.fused import rates
from fastmeta.executors.fused.recipe import Recipe
from fastmeta.executors.problem import Problem

_NORMS = (None, True, False)
"""By whether a norm takes the statistics of the batch."""


def extension() -> ModuleType | None:
    """The compiled kernels, where this installation has them."""
    try:
        module = importlib.import_module("fastmeta._C")
    except ImportError:
        return None
    # An editable install may still have the extension of an earlier checkout.
    return module if hasattr(module, "FusedStep") else None


def environment() -> tuple[str, str, str]:
    """What beside its arguments a step's kernel is chosen by."""
    look = os.environ.get
    return look("FASTMETA_ISA", ""), look("FASTMETA_ENGINE", ""), look("FASTMETA_FORM", "")


@dataclass(frozen=True, eq=False)
class Kernel:
    """What is the same in every call for a recipe, sizes and options."""

    recipe: Recipe
    step: Any
    """The compiled step."""
    names: tuple[str | None, ...]
    """Of its tensors: weight, bias, scale and shift of each layer."""
    evaluates: tuple[bool, ...]
    """Whether the query loss after each number of steps is asked for."""
    rates: Tensor | None
    """Where all learning rates are one number."""
    elementwise: bool

    @property
    def group(self) -> tuple[int, int, float]:
        """How many tasks it takes at a time, their storage in bytes, and its estimated seconds."""
        return self.step.tasks, self.step.storage_bytes, self.step.seconds

    @property
    def body_flops(self) -> int:
        """Of an example's forward pass through the layers that are run once."""
        return sum(2 * d.inputs * d.outputs for d in self.recipe.layers[: self.step.body])


def kernel(problem: Problem, recipe: Recipe) -> Kernel:
    """The kernel for this problem's sizes and options."""
    inner, tasks = problem.inner, problem.tasks
    elementwise = rates.elementwise(inner)
    step = _step(
        recipe,
        inner.adapted,
        (tasks.support.count, tasks.query.count if tasks.query else 0, inner.steps),
        (
            problem.differentiate,
            inner.first_order,
            elementwise,
            problem.differentiate and bool(inner.learned_rates()),
        ),
        inner.prox,
        problem.task_weights.dtype == torch.float64,
        tasks.tasks,
        *environment(),
    )
    names = tuple(name for layer in recipe.layers for name in layer.tensors())
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    fixed = rates.one_number(inner, len(names), problem.task_weights)
    return Kernel(recipe, step, names, evaluates, fixed, elementwise)


@functools.lru_cache(maxsize=256)
def _step(
    recipe: Recipe, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int, isa: str,
    engine: str, form: str,
) -> Any:  # fmt: skip
    module = extension()
    assert module is not None
    layers = [
        (
            layer.inputs, layer.outputs, layer.activation or 0, *layer.options,
            _NORMS.index(layer.norm and layer.norm.batch_statistics),
            layer.norm.eps if layer.norm else 0.0,
            [name is not None for name in layer.tensors()],
            [name in adapted for name in layer.tensors()],
        )
        for layer in recipe.layers
    ]  # fmt: skip
    return module.FusedStep(
        layers, recipe.loss, recipe.loss_option, recipe.ignore_index, recipe.weighted, *sizes,
        *flags, prox, is_double, tasks, isa, engine, form,
    )  # fmt: skip
