"""Tasks of different sizes: padded and masked where that is safe, grouped by size where not."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.arguments import plan_step
from fastmeta.options import Options
from fastmeta.plan.snapshot import snapshot

SIZES = [(4, 6), (2, 3), (4, 6), (1, 5), (3, 3), (2, 3)]


def pairs(sizes: list[int], classes: int | None = 3, width: int = 3) -> list[tuple[Tensor, Tensor]]:
    def targets(n: int) -> Tensor:
        if classes is None:
            return torch.randn(n, 2).double()
        return torch.randint(classes, (n,))

    return [(torch.randn(n, width).double(), targets(n)) for n in sizes]


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def agree(model: nn.Module, support: Any, query: Any, loss_fn: Any) -> fastmeta.MetaStep:
    tasks = [(*s, *q) for s, q in zip(support, query, strict=True)]
    model.zero_grad()
    reference = oracle.maml(
        model, tasks, list(model.parameters()), steps=2, rate=lambda *_: 0.1, loss_fn=loss_fn
    )
    out = fastmeta.maml_step(model, support, query, inner_lr=0.1, inner_steps=2, loss_fn=loss_fn)
    out.loss.backward()
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12)
    for p, g in zip(model.parameters(), reference.gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(out.query_outputs, reference.query_outputs, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    return out


LOSSES = {
    "cross-entropy": (F.cross_entropy, 3),
    "smoothed": (lambda p, t: F.cross_entropy(p, t, label_smoothing=0.1), 3),
    "class-weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)), 3
    ),
    "ignored-label": (nn.CrossEntropyLoss(ignore_index=2), 3),
    "mse": (F.mse_loss, None),
    "huber": (nn.HuberLoss(delta=0.7), None),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.5), None),
    "l1": (F.l1_loss, None),
    "bce": (F.binary_cross_entropy_with_logits, None),
}  # fmt: skip


@pytest.mark.parametrize("form", ["vmap", "loop"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_padded_and_of_grouped_tasks(name: str, form: str, force_form) -> None:
    force_form(form)
    loss_fn, classes = LOSSES[name]
    support = pairs([n for n, _ in SIZES], classes)
    query = pairs([q for _, q in SIZES], classes)
    if name == "ignored-label":
        # A set of nothing but ignored labels has no mean; every set here keeps a real one.
        for _, y in support + query:
            y[0] = 0
    model = mlp(3 if classes else 2)
    agree(model, support, query, loss_fn)
    options = Options(inner_lr=0.1, inner_steps=2, loss_fn=loss_fn)
    groups = plan_step(model, snapshot(model), support, query, options, True).groups
    # Padded into one batch for vmap; the loop takes the four sizes as they are.
    assert len(groups) == (1 if form == "vmap" else 4)


@pytest.mark.parametrize("form", ["vmap", "loop"])
def test_batch_norm_sees_the_real_examples_only(form: str, force_form) -> None:
    force_form(form)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    support, query = pairs([4, 2, 4, 3]), pairs([6, 3, 6, 3])
    agree(model, support, query, F.cross_entropy)
    options = Options(inner_lr=0.1, inner_steps=2, loss_fn=F.cross_entropy)
    step = plan_step(model, snapshot(model), support, query, options, True)
    assert [indices for indices, _ in step.groups] == [[0, 2], [1], [3]]


def test_a_loss_of_ones_own_is_grouped() -> None:
    agree(
        mlp(), pairs([n for n, _ in SIZES]), pairs([q for _, q in SIZES]),
        lambda p, t: (p.logsumexp(-1) - p.gather(-1, t[:, None])[:, 0]).square().mean(),
    )  # fmt: skip


def test_task_weights_and_inputs_that_require_grad() -> None:
    model = mlp()
    support, query = pairs([4, 2, 4]), pairs([3, 5, 3])
    for x, _ in support + query:
        x.requires_grad_()
    weights = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    leaves = [*model.parameters(), weights, *(x for x, _ in support + query)]
    tasks = [(*s, *q) for s, q in zip(support, query, strict=True)]
    reference = oracle.maml(model, tasks, leaves, steps=2, task_weights=weights)
    fastmeta.maml_step(model, support, query, inner_steps=2, task_weights=weights).loss.backward()
    for leaf, gradient in zip(leaves, reference.gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-11)


def test_equal_sizes_in_a_list_are_one_batch() -> None:
    model = mlp()
    support, query = pairs([4, 4]), pairs([3, 3])
    listed = fastmeta.maml_step(model, support, query)
    stacked = fastmeta.maml_step(
        model,
        tuple(torch.stack(parts) for parts in zip(*support, strict=True)),
        tuple(torch.stack(parts) for parts in zip(*query, strict=True)),
    )
    assert torch.equal(listed.loss, stacked.loss)
    assert len(listed.query_outputs) == 2
