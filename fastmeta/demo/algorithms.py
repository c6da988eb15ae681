"""How the Omniglot demonstration trains and tests each algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmeta
from fastmeta import MetaStep
from fastmeta.algorithms.learner import Learner
from fastmeta.demo.networks import not_batch_norm

META_LR = 1e-3
BATCH, SHOTS = 10, 10
"""Reptile's: images of an inner step, and of a class in training."""


@dataclass(frozen=True)
class Defaults:
    """The options of an algorithm where the command line gives none."""

    inner_lr: float = 0.4
    inner_steps: int = 1
    test_steps: int | None = None
    """None: as in training."""
    tasks: int = 32
    """Of a meta-step."""
    train_shots: int | None = None
    """None: as in the test."""


@dataclass(frozen=True)
class Trainer:
    """A model as one algorithm trains and tests it."""

    step: Callable[[Any, Any], MetaStep]
    """One meta-step's loss, of `(support, query)`."""
    tested: Learner | fastmeta.Prototypical
    """What `fastmeta.evaluate` takes."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None

    def predict(self, support: Any, query: Any, inner_steps: int) -> Tensor:
        """Scores, `[T, Q, ways]`, of the query images."""
        if isinstance(self.tested, fastmeta.Prototypical):
            with torch.no_grad():
                return self.tested(support, query).query_outputs
        return self.tested.adapt(support, inner_steps=inner_steps)(query[0])


_Make = Callable[[nn.Module, dict[str, Any], int], Trainer]


def _learner(make: Callable[..., Any], **more: Any) -> _Make:
    def made(model: nn.Module, options: dict[str, Any], iterations: int) -> Trainer:
        learner = make(model, **{"adapt": not_batch_norm, **options, **more})
        return Trainer(learner, learner, _adam(learner))

    return made


def _anil(model: nn.Module, options: dict[str, Any], iterations: int) -> Trainer:
    """MAML of the last layer alone."""
    last = [name for name, _ in model.named_children()][-1]
    learner = fastmeta.MAML(model, adapt=last, **options)
    return Trainer(learner, learner, _adam(learner))


def _reptile(model: nn.Module, options: dict[str, Any], iterations: int) -> Trainer:
    """Small batches of many shots, an outer step that shrinks to nothing: the paper's."""
    options |= {"inner_optimizer": fastmeta.inner.Adam(betas=(0.0, 0.999))}
    learner = fastmeta.Reptile(model, per_step_support=True, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    shrinking = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)

    def step(support: tuple[Tensor, Tensor], query: Any) -> MetaStep:
        x, y = support
        shape = len(y), options["inner_steps"], min(BATCH, y.shape[1])
        order = torch.rand(*shape[:2], y.shape[1], device=y.device).argsort(-1)
        chosen = order[..., : shape[2]]  # [T, K, batch]
        task = torch.arange(shape[0], device=y.device)[:, None, None]
        return learner((x[task, chosen], y[task, chosen]))

    return Trainer(step, fastmeta.Reptile(model, **options), optimizer, shrinking)


def _prototypical(model: nn.Module, options: dict[str, Any], iterations: int) -> Trainer:
    """The network without its last layer embeds."""
    assert isinstance(model, nn.Sequential)
    learner = fastmeta.Prototypical(model[:-1])
    return Trainer(learner, learner, _adam(learner))


def _adam(learner: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=META_LR, fused=True)


ALGORITHMS: dict[str, tuple[str, Defaults, _Make]] = {
    "maml": ("MAML", Defaults(), _learner(fastmeta.MAML)),
    "fomaml": ("first-order MAML", Defaults(), _learner(fastmeta.MAML, first_order=True)),
    "anil": ("ANIL", Defaults(), _anil),
    "meta-sgd": ("Meta-SGD", Defaults(), _learner(fastmeta.MAML, learn_inner_lr="element")),
    "imaml": (
        "implicit MAML",
        Defaults(inner_lr=0.1, inner_steps=16),
        _learner(fastmeta.IMAML, prox=2.0, cg_steps=5),
    ),
    "reptile": (
        "Reptile",
        Defaults(inner_lr=1e-3, inner_steps=5, test_steps=50, tasks=5, train_shots=SHOTS),
        _reptile,
    ),
    "prototypical": ("prototypical networks", Defaults(), _prototypical),
}
"""By name on the command line: title, options, and what makes its trainer."""
