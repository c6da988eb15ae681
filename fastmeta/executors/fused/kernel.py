"""The compiled step for a network, sizes and options, and how data is packed for it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors import rates, update_rule
from fastmeta.executors.base import NotSupported
from fastmeta.executors.extension import extension
from fastmeta.executors.fused.lowering import Dense, Lowered
from fastmeta.executors.fused.own_loss import OwnLoss
from fastmeta.executors.problem import Problem
from fastmeta.executors.programs import of_activation
from fastmeta.inner_loop import SHARED, InnerLoop
from fastmeta.network.layers import BatchNorm, LayerNorm, RMSNorm, Scale, Shift

_NORMS = ("none", "batch", "running", "columns", "layer", "rms")
"""In the order of csrc/network.h."""

_ENVIRONMENT = ("ISA", "ENGINE", "FORM", "MEMORY", "CHUNK")

_FLAT, _SMALL = 1.3, 8 << 20
"""The multiple of one step's bytes that counts as flat in K, and the bytes that do in any case."""


def environment() -> tuple[str, ...]:
    """The variables that a step's kernel is chosen by; looked at once a model."""
    return tuple(os.environ.get(f"FASTMETA_{name}", "") for name in _ENVIRONMENT)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The part of a call that network, sizes and options decide."""

    lowered: Lowered
    step: Any
    """The compiled step."""
    names: tuple[str | None, ...]
    """The names of its tensors: weight, bias, scale and shift of each layer."""
    evaluates: tuple[bool, ...]
    """By number of steps, True where the query loss after them is asked for."""
    norms: tuple[BatchNorm | None, ...]
    """The batch norm of each layer."""
    draws: bool
    """True where a pass draws masks of dropout."""
    _rates: list[tuple[Hashable, Tensor]] = field(default_factory=list)

    def one_rate(self, inner: InnerLoop, like: Tensor) -> Tensor | None:
        """The packed learning rates where all are one number; made anew for another number."""
        number = inner.rates.get(SHARED)
        if not isinstance(number, float):
            return None
        shape = (inner.steps, len(self.names))
        return self._kept(self._rates, number, lambda: like.new_full(shape, number))

    def _kept(
        self, last: list[tuple[Hashable, Tensor]], key: Hashable, make: Callable[[], Tensor]
    ) -> Tensor:
        """The tensor that was made last, where it was for the same key."""
        for known, packed in last:
            if known == key:
                return packed
        packed = make()
        last[:] = [(key, packed)]
        return packed

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of an example's prediction."""
        return self.lowered.output_shape

    @property
    def description(self) -> str:
        """The kernel in words."""
        step = self.step
        chunks = f", {step.chunk} examples at a time" if step.chunk else ""
        return (
            f"{step.instruction_set}, lanes over {step.engine}, first layer {step.form}, "
            f"inner loop {step.memory}{chunks}"
        )

    @property
    def body_flops(self) -> int:
        """The FLOP of an example's forward pass through the layers that are run once."""
        return sum(
            2 * d.inputs * d.outputs for d in self.lowered.layers[: self.step.body] if d.weight
        )


def kernel(
    problem: Problem, lowered: Lowered, low_memory: bool = False, inputs_flow: bool = False
) -> Kernel:
    """The kernel for this problem's sizes and options; `inputs_flow`: with gradients by inputs."""
    inner = problem.inner
    evaluates = tuple(problem.evaluates(k) for k in range(inner.steps + 1))
    step = _step(lowered, *_step_arguments(problem, inner.steps, low_memory), inputs_flow)
    draws = any(layer.dropout for layer in lowered.layers)
    return Kernel(lowered, step, lowered.names(), evaluates, lowered.norms(), draws)


def check_flat(problem: Problem, lowered: Lowered) -> None:
    """**Raises** `NotSupported` where a reversible kernel's memory is not flat in K.

    Weights are rebuilt, activations and deltas of every step are not. Sets of parameters may grow:
    those of an update rule do, with its state.
    """
    first, whole = (
        _step(lowered, *_step_arguments(problem, steps, True), False)
        for steps in (1, max(1, problem.inner.steps))
    )
    sets = problem.inner.steps * whole.parameters * problem.task_weights.element_size()
    if whole.storage_bytes - sets - whole.rule_bytes > max(_FLAT * first.storage_bytes, _SMALL):
        raise NotSupported(
            f"memory='low' asks for memory flat in K, and what {problem.inner.steps} steps leave "
            f"takes {whole.storage_bytes >> 20} MB a thread, one step's "
            f"{first.storage_bytes >> 20} MB"
        )


def _step_arguments(problem: Problem, steps: int, low_memory: bool) -> tuple[Any, ...]:
    inner, tasks = problem.inner, problem.tasks
    elementwise = rates.elementwise(inner)
    isa, engine, form, memory, chunk = environment()
    return (
        inner.adapted,
        (tasks.support.count, tasks.query.count if tasks.query else 0, steps),
        (
            problem.differentiate,
            inner.first_order,
            elementwise,
            problem.differentiate and bool(inner.learned_rates()),
        ),
        inner.prox,
        problem.task_weights.dtype == torch.float64,
        tasks.rounded,
        isa,
        engine,
        form,
        memory or ("reversible" if low_memory else ""),
        update_rule.describe(inner, problem.differentiate).description,
        tasks.per_step is not None,
        chunk,
    )


@functools.lru_cache(maxsize=256)
def _step(
    lowered: Lowered, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int, isa: str,
    engine: str, form: str, memory: str, rule: update_rule.Description, per_step_support: bool,
    chunk: str, inputs_flow: bool,
) -> Any:  # fmt: skip
    module = extension()
    assert module is not None
    return module.FusedStep(
        *described(lowered, adapted, is_double), *sizes, *flags, prox, is_double, tasks, isa,
        engine, form, memory, rule, per_step_support, query_loss(lowered),
        _programs(module, lowered), chunk, inputs_flow,
    )  # fmt: skip


def _programs(module: Any, lowered: Lowered) -> Any:
    """The programs of the expressions in a network and its losses."""
    losses = [
        loss.programs.made if isinstance(loss, OwnLoss) else None
        for loss in (lowered.loss, lowered.query_loss)
    ]
    return module.Programs(*layer_programs(lowered.layers), *losses)


def layer_programs(layers: Sequence[Dense]) -> tuple[list[Any], list[Any]]:
    """The programs of activations that are expressions, with and without curvature.

    None for those that are not.
    """
    made = [each.expression and of_activation(each.expression) for each in layers]
    return [each and each[0] for each in made], [each and each[1] for each in made]


def described(lowered: Lowered, adapted: tuple[str, ...], is_double: bool) -> tuple[Any, ...]:
    """Network and loss as the compiled steps are given them."""
    loss = lowered.loss
    layers = described_layers(lowered.layers, adapted, is_double)
    return layers, loss.kind, loss.option, loss.ignore_index, loss.weighted


def described_layers(
    layers: Sequence[Dense], adapted: Collection[str], is_double: bool
) -> list[tuple[Any, ...]]:
    """Layers as the compiled steps are given them."""
    dtype = torch.float64 if is_double else torch.float32
    return [
        (
            layer.inputs, layer.outputs, layer.activation or 0, *layer.options,
            *_norm(layer, dtype),
            [name is not None for name in layer.tensors()],
            [name in adapted for name in layer.tensors()],
            (layer.source, layer.plus, layer.dropout is not None),
        )
        for layer in layers
    ]  # fmt: skip


def _norm(layer: Dense, dtype: torch.dtype) -> tuple[int, float]:
    """The number of its norm's kind, and what that adds to variances."""
    norm = layer.norm
    if norm is None:
        return 0, 0.0
    if isinstance(norm, (Scale, Shift)):
        return _NORMS.index("columns"), 0.0
    if isinstance(norm, RMSNorm):
        return _NORMS.index("rms"), norm.eps_in(dtype)
    if isinstance(norm, LayerNorm):
        return _NORMS.index("layer"), norm.eps
    return _NORMS.index("batch" if norm.batch_statistics else "running"), norm.eps


def query_loss(lowered: Lowered) -> tuple[int, float, int, bool]:
    """The query sets' loss as the compiled steps are given it."""
    loss = lowered.query_loss
    return loss.kind, loss.option, loss.ignore_index, loss.weighted
