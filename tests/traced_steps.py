"""Steps whose losses and activations are formulas, beside the general path in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastmeta


class By(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sets(count: int, outputs: int, tasks: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, count, 3).double(), torch.randn(tasks, count, outputs).double()


def network(outputs: int, between: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    layers = nn.Linear(3, 7), between(), nn.Linear(7, 6), between(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double()


def agree(
    model: nn.Module, support: Any, query: Any, leaves: list[Tensor], executor: str = "fused",
    **options: Any,
) -> Any:  # fmt: skip
    """The step, which the general path repeats."""
    options = {"inner_lr": 0.1, "inner_steps": 2, **options}
    found: list[Any] = []
    for name in (executor, "generic"):
        out = fastmeta.maml_step(model, support, query, executor=name, **options)
        leaves = [*dict.fromkeys([*model.parameters(), *leaves])]
        found.append((out, torch.autograd.grad(out.loss, leaves, allow_unused=True)))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours.task_losses, theirs.task_losses)
    torch.testing.assert_close(ours.support_losses, theirs.support_losses)
    for a, b in zip(gradients, expected, strict=True):
        if b is not None:
            assert a is not None
            assert float((a - b).norm()) <= 1e-9 * max(1.0, float(b.norm()))
    return ours
