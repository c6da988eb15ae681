"""What every executor is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmeta.inner_loop import InnerLoop
from fastmeta.tasks import TaskBatch, Tree


@dataclass(frozen=True, eq=False)
class StatelessModel:
    """A module as a function of its parameters: the module itself is never written.

    `written` names the buffers that a forward pass writes (running statistics); each pass writes
    to a copy that is thrown away.
    """

    module: nn.Module
    written: tuple[str, ...] = ()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, tied ones once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def scratch(self) -> dict[str, Tensor]:
        """The buffers that a pass writes, cut off from autograd."""
        return {name: self.module.get_buffer(name).detach() for name in self.written}

    def __call__(
        self, parameters: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        replaced = dict(parameters)
        for name, buffer in scratch.items():
            replaced[name] = buffer.clone()
        if isinstance(inputs, Mapping):
            return functional_call(self.module, replaced, (), dict(inputs))
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        return functional_call(self.module, replaced, args)


@dataclass(frozen=True, eq=False)
class Problem:
    """One meta-step to compute.

    `objective(prediction, targets, weights)` is the mean loss of one task's examples; `weights`
    (`[N]` or None) are those of `Examples`. `differentiate` asks for the meta-gradient.
    """

    model: StatelessModel
    objective: Callable[[Any, Tree, Tensor | None], Tensor]
    tasks: TaskBatch
    inner: InnerLoop
    task_weights: Tensor  # [T], cut off from autograd
    differentiate: bool
    may_capture: bool
    """Whether loss or model could reach a tensor that is neither argument nor parameter."""
    draws_random: bool = False
    """Whether a forward pass draws from torch's generator (dropout)."""
    keep_adapted: bool = False
    """Whether the adapted parameters are asked for."""
    has_attention: bool = False
    """Whether a forward pass calls `scaled_dot_product_attention`."""

    def evaluates(self, step: int) -> bool:
        """Whether the query loss after this many steps is asked for."""
        return self.tasks.query is not None and self.inner.evaluates(step)


@dataclass(eq=False)
class Outcome:
    """The loss of every task, and the meta-gradient where it was asked for.

    `gradients` pairs each leaf with the gradient of `sum_t task_weights[t] * task_losses[t]`,
    or with None where the loss does not reach it.
    """

    step_losses: Tensor  # [K + 1, T]; zero where not evaluated
    support_losses: Tensor  # [K, T]
    query_outputs: Tree  # leaves [T, Q, ...]; None without a query set
    gradients: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    adapted: dict[str, Tensor] = field(default_factory=dict)  # name to [T, ...]


class FormUnavailable(Exception):
    """A way of computing the step can't serve this problem; the message says why."""


@contextmanager
def same_random_numbers(device: torch.device) -> Generator[None, None, None]:
    """Leaves torch's generators as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
