"""What every layer is: a description, a reference by torch, and four rules for all tasks at once.

T tasks, N examples of a set. Values are `[T, N, ...]`, images channels last in memory; parameters
are `[S, ...]`, with S = T where each task has its own and S = 1 where they share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Parameters and buffers by name."""

Gradients = tuple[tuple[Tensor | None, ...], dict[str, Tensor]]
"""Of a layer's inputs and of its parameters, by name."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The support or the query set of the tasks that are computed at once."""

    tasks: int
    count: int
    weights: Tensor | None = None
    """[T, N]; None where every example is real, else summing to one a task, zero on padding."""


@dataclass(frozen=True)
class Wanted:
    """Which gradients a backward rule gives."""

    inputs: tuple[bool, ...]
    parameters: Mapping[str, int]
    """T for a gradient of each task's own, 1 for their sum over tasks."""


@dataclass(eq=False)
class State:
    """A layer in one pass: where it is evaluated, and what its rules leave for later ones."""

    at: Tensors
    batch: Batch
    tangents: Tensors = field(default_factory=dict)
    """The tangents of the parameters that have one."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    of_kernels: Any = None
    """What kernels of a fused block leave for their later passes."""


class Layer:
    """One kind of layer. The rules are called in this order, the last three where needed.

    With `y = f(x, w)` and a loss L: `forward` gives y, `backward` the gradients of L from that of
    y, `tangent` the derivative of y along the tangents of x and w, and `tangent_backward` the
    derivative of the gradients along the same (Pearlmutter's R-operator).
    """

    @property
    def mixes_examples(self) -> bool:
        """Whether an example's output may depend on other examples of its set."""
        return False

    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return ()

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        """One task's `[N, ...]` by torch's own function, whose autograd the rules must repeat."""
        raise NotImplementedError

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        """Of the reference's forward pass that gave `output`."""
        return output.numel()

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        """The output."""
        raise NotImplementedError

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        """The gradients that are wanted, from the output's."""
        raise NotImplementedError

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        """The output's tangent; None is an input without one. At least one tangent is given."""
        raise NotImplementedError

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        """The tangents of what `backward` gave, from that of the output's gradient."""
        raise NotImplementedError


def named(tensors: Tensors, name: str | None) -> Tensor | None:
    """The tensor of that name, if there is one."""
    return None if name is None else tensors.get(name)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
