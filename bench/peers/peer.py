"""What a peer is: a library, how to get it, and the forms that its meta-step can take."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.workloads import Pair, Workload

Result = tuple[float, list[Tensor]]
"""A loss, and the meta-gradient in the order of `model.parameters()`."""


class NotServed(Exception):
    """What a peer can't do; the message says why."""


@dataclass(frozen=True)
class Step:
    """One whole meta-step over data that is already in place."""

    call: Callable[[], Any]
    """Loss and meta-gradient, in whatever form the library gives them: what is timed."""
    read: Callable[[Any], Result]
    """What `call` gave, as numbers: not timed."""


Form = Callable[[Workload, nn.Module, Pair, Pair], Step]
"""Makes the step of a workload; the model is the form's own. **Raises** `NotServed`."""


@dataclass(frozen=True)
class Peer:
    """One column of the comparison; its figure is that of its fastest form."""

    name: str
    forms: Mapping[str, Form]
    module: str = "torch"
    """What must be importable."""
    install: str = ""
    """The command that makes it so."""
    role: Literal["peer", "fastmeta", "yardstick"] = "peer"
    """A yardstick is measured beside the others, but nobody can install it as MAML."""
    second_order: bool = True
    """False where there is no meta-gradient to check."""

    def missing(self) -> str | None:
        """How to get it, where it is not installed."""
        if importlib.util.find_spec(self.module) is not None:
            return None
        return f"not installed: {self.install}"


def into_grad(model: nn.Module, step: Callable[[], Tensor]) -> Step:
    """A step that returns the loss and leaves the meta-gradient in `.grad`, emptied before."""
    parameters = list(model.parameters())

    def call() -> Tensor:
        for p in parameters:
            p.grad = None
        return step()

    def read(loss: Tensor) -> Result:
        return float(loss), [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters
        ]

    return Step(call, read)


def descent_only(workload: Workload, name: str) -> None:
    """**Raises** `NotServed` where the inner loop has another rule."""
    if workload.rule != "descent":
        raise NotServed(f"{name} has no {workload.rule} in its inner loop")


TaskLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A task's query loss after its inner loop, from support x and y and query x and y."""


def loop_forms(
    task_loss: Callable[[Workload, nn.Module], tuple[nn.Module, TaskLoss]],
) -> dict[str, Form]:
    """Both loops over tasks: one backward for all at the end, and one after each task.

    `task_loss` gives the module whose parameters collect the gradient, and a task's loss.
    """

    def at_end(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        model, loss_of = task_loss(workload, model)

        def step() -> Tensor:
            losses = [
                loss_of(support[0][i], support[1][i], query[0][i], query[1][i])
                for i in range(workload.tasks)
            ]
            loss = torch.stack(losses).mean()
            loss.backward()
            return loss.detach()

        return into_grad(model, step)

    def per_task(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        model, loss_of = task_loss(workload, model)

        def step() -> Tensor:
            total = torch.zeros((), dtype=query[0].dtype)
            for i in range(workload.tasks):
                loss = loss_of(support[0][i], support[1][i], query[0][i], query[1][i])
                loss = loss / workload.tasks
                loss.backward()
                total += loss.detach()
            return total

        return into_grad(model, step)

    return {"backward at end": at_end, "backward per task": per_task}


def without_its_init(package: str) -> None:
    """Makes a package's submodules importable without running its `__init__`.

    Two of the peers import gym or torchvision there, which nothing here needs.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise NotServed(f"{package} is not installed")
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__spec__ = spec
    sys.modules[package] = bare
