"""Networks of convolutional blocks and the compiled step on them, by the float64 oracle."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from torch import Tensor, nn

import fastmeta

TOLERANCE = 1e-10
"""In float64: sums of at most a few thousand terms, a few blocks and steps."""


class Block(nn.Sequential):
    """Convolution, norm, ReLU and maybe a maximum; a norm's own tensors are drawn."""

    def __init__(self, inputs: int, filters: int, *, pool: int = 2, **options: Any) -> None:
        norm = nn.BatchNorm2d(filters, track_running_stats=False)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        options = {"kernel_size": 3, "padding": 1, **options}
        layers = [nn.Conv2d(inputs, filters, **options), norm, nn.ReLU()]
        super().__init__(*layers, *([nn.MaxPool2d(pool)] if pool > 1 else []))


class Average(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def running(filters: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(filters)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    norm.num_batches_tracked.fill_(3)
    return norm.eval()


def flat(width: int, classes: int = 3) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(width, classes)]


OPTIONS: dict[str, dict[str, Any]] = {
    "one-step": {"inner_steps": 1},
    "three-steps": {"inner_steps": 3},
    "no-steps": {"inner_steps": 0},
    "first-order": {"inner_steps": 2, "first_order": True},
    "multi-step": {"inner_steps": 2, "step_weights": [0.2, 0.3, 0.5]},
    "proximal": {"inner_steps": 2, "prox": 0.7},
    "task-weights": {"inner_steps": 2, "task_weights": [0.3, 1.1, 0.2]},
    "head-alone": {"inner_steps": 2, "adapt": "last"},
    "body-alone": {"inner_steps": 2, "adapt": "first"},
    "head-multi-step": {
        "inner_steps": 2, "adapt": "last", "step_weights": [0.2, 0.3, 0.5], "prox": 0.3,
    },
    "head-first-order": {"inner_steps": 2, "adapt": "last", "first_order": True},
}  # fmt: skip


def batch(
    image: tuple[int, ...], tasks: int, count: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, count, *image).to(dtype), torch.randint(3, (tasks, count))


def resolved(model: nn.Module, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options as `maml_step` and as the oracle take them."""
    names = [name for name, _ in model.named_parameters()]
    first, last = names[0].split(".")[0], names[-1].split(".")[0]
    ours, theirs = dict(options), dict(options)
    theirs["steps"] = theirs.pop("inner_steps")
    if "adapt" in options:
        chosen = last if options["adapt"] == "last" else first
        ours["adapt"] = [n for n in names if n.split(".")[0] == chosen]
        theirs.pop("adapt")
        theirs["adapted"] = ours["adapt"]
    for key in ("step_weights", "task_weights"):
        if key in options:
            ours[key] = theirs[key] = torch.tensor(options[key], dtype=torch.float64)
    return ours, theirs


def apart(ours: Any, exact: Any) -> float:
    """Relative to the whole gradient."""
    left, right = (
        torch.cat([(torch.zeros(1) if g is None else g).flatten().double() for g in gradients])
        for gradients in (ours, exact)
    )
    return float((left - right).norm() / right.norm())


def check(
    model: nn.Module,
    support: Any,
    query: Any,
    options: dict[str, Any],
    rate: float = 0.1,
    **more: Any,
) -> None:
    ours, theirs = resolved(model, options)
    leaves = list(model.parameters())
    expected = oracle.maml(
        model, oracle.split(support, query), leaves, rate=lambda *_: rate, **theirs, **more
    )
    out = fastmeta.maml_step(
        model, support, query, inner_lr=rate, executor="layered", **ours, **more
    )
    assert out.executor == "layered-cpu"
    torch.testing.assert_close(out.task_losses, expected.task_losses)
    torch.testing.assert_close(out.query_outputs, torch.stack(expected.query_outputs).detach())
    for k in range(theirs["steps"]):
        found = torch.stack([losses[k] for losses in expected.support_losses])
        torch.testing.assert_close(out.support_losses[k], found)
    gradients = torch.autograd.grad(out.loss, leaves)
    assert apart(gradients, expected.gradients) < TOLERANCE


def check_ragged(model: nn.Module, image: tuple[int, ...]) -> None:
    """Tasks of different sizes: the real examples count alone."""
    sets = [
        [(torch.randn(n, *image).double(), torch.randint(3, (n,))) for n in counts]
        for counts in ((4, 2, 3), (2, 5, 5))
    ]
    tasks = [(*s, *q) for s, q in zip(*sets, strict=True)]
    leaves = list(model.parameters())
    expected = oracle.maml(model, tasks, leaves, steps=2, rate=lambda *_: 0.1)
    out = fastmeta.maml_step(model, *sets, inner_lr=0.1, inner_steps=2, executor="layered")
    assert out.executor == "layered-cpu"
    torch.testing.assert_close(out.task_losses, expected.task_losses)
    for ours, theirs in zip(out.query_outputs, expected.query_outputs, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert apart(torch.autograd.grad(out.loss, leaves), expected.gradients) < TOLERANCE
