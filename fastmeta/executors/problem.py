"""What every executor is given, and what it gives back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.inner_loop import InnerLoop
from fastmeta.tasks import TaskBatch, Tree


class Slots:
    """The places in a module where its parameters and buffers hang; holds no module."""

    def __init__(self, module: nn.Module) -> None:
        canonical: dict[int, str] = {}
        self.trainable: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.filled: list[tuple[dict[str, Any], str, str]] = []
        """(dictionary, key, name); tied tensors go by the first of their names."""
        self.empty: list[tuple[dict[str, Any], str]] = []
        self.buffers: set[str] = set()
        for prefix, part in module.named_modules(remove_duplicate=False):
            for tensors in (part._parameters, part._buffers):
                for key, tensor in tensors.items():
                    if tensor is None:
                        self.empty.append((tensors, key))
                        continue
                    name = canonical.setdefault(id(tensor), f"{prefix}.{key}".lstrip("."))
                    self.filled.append((tensors, key, name))
                    if tensors is part._buffers:
                        self.buffers.add(name)
                    else:
                        self.parameters[name] = tensor
                        if tensor.requires_grad:
                            self.trainable[name] = tensor


swapping = threading.RLock()
"""Held while a module has other tensors than its own: two models may share it, in two threads."""


class StatelessModel:
    """A module as a function of its parameters: a pass leaves the module as it was.

    `written` names the buffers that a pass writes in place (running statistics); each pass writes
    to a copy that is thrown away, of any other buffer too: a setting, or other data, may have it
    written after all. What `torch.func.functional_call` does, at a third of its cost: the places to
    swap are looked up once, and kept as long as the caller keeps `slots`.
    """

    def __init__(
        self, module: nn.Module, written: tuple[str, ...] = (), slots: Slots | None = None
    ) -> None:
        self.module = module
        self.written = written
        self._slots = Slots(module) if slots is None else slots
        self.may_write = self._slots.buffers.difference(written)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name, tied ones once."""
        return self._slots.trainable

    def all_parameters(self) -> dict[str, Tensor]:
        """The parameters by name, frozen ones too."""
        return self._slots.parameters

    def scratch(self) -> dict[str, Tensor]:
        """The buffers that a pass writes, cut off from autograd."""
        return {name: self.module.get_buffer(name).detach() for name in self.written}

    def __call__(
        self, tensors: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        """The prediction with these parameters and buffers in place of the module's own."""
        with swapping:
            before = [place[key] for place, key, _ in self._slots.filled]
            try:
                try:
                    return self._with(tensors, inputs, scratch)
                finally:
                    self._put_back(before)
            except BaseException:
                # Once more, because an interrupt may have come while it was put back.
                self._put_back(before)
                raise

    def _with(
        self, tensors: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        filled, may_write = self._slots.filled, self.may_write
        for place, key, name in filled:
            if name in scratch:
                place[key] = scratch[name].clone()
            elif name in tensors:
                place[key] = tensors[name]
            elif name in may_write:
                place[key] = private(place[key])
        if isinstance(inputs, Mapping):
            return self.module(**inputs)
        if isinstance(inputs, (tuple, list)):
            return self.module(*inputs)
        return self.module(inputs)

    def _put_back(self, before: list[Tensor]) -> None:
        # Every tensor, because a forward may also have bound a buffer anew.
        for (place, key, _), tensor in zip(self._slots.filled, before, strict=True):
            place[key] = tensor
        for place, key in self._slots.empty:
            place[key] = None


_SMALL = 1 << 14
"""Elements of a tensor that are copied in no more time than it takes to put that off."""


def private(tensor: Tensor) -> Tensor:
    """A copy to write to. The memory of a large one is copied when either tensor is written."""
    if tensor.numel() > _SMALL:
        # Refused where its memory is not torch's own: NumPy's, a mapped file.
        with suppress(RuntimeError, TypeError):
            return tensor._lazy_clone()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor.clone()


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
    unread: frozenset[str] = frozenset()
    """Parameters that no layer reads, where the layers are known: an auxiliary head's."""
    keeps_features: bool = False
    """True where running once what stands in front of the adapting parameters has been verified."""

    @property
    def read(self) -> Problem:
        """The same where nothing adapts that no layer reads."""
        if not self.unread or self.unread.isdisjoint(self.inner.adapted):
            return self
        return replace(self, inner=self.inner.without(self.unread))

    def completed(self, outcome: Outcome) -> Outcome:
        """The outcome of `read`, with what no layer reads as it was."""
        if self.keep_adapted and self.unread:
            named, tasks = self.model.parameters(), self.tasks.tasks
            for name in self.unread.intersection(self.inner.adapted):
                value = named[name].detach()
                outcome.adapted[name] = value.expand(tasks, *value.shape).clone()
        return outcome

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
