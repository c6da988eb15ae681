"""`prototypical_step` against the paper's loss written out, one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

TASKS, CLASSES, SHOTS, ASKED = 3, 4, 2, 5
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7)), (5,)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        ),
        (1, 6, 6),
    ),
}


def made(network: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(2)
    build, shape = NETWORKS[network]
    classes = torch.arange(CLASSES).repeat(SHOTS)
    labels = torch.stack([classes[torch.randperm(CLASSES * SHOTS)] for _ in range(TASKS)])
    support = torch.randn(TASKS, CLASSES * SHOTS, *shape).double(), labels
    query = torch.randn(TASKS, ASKED, *shape).double(), torch.randint(CLASSES, (TASKS, ASKED))
    return build().double(), support, query


def scores(z: Tensor, asked: Tensor, labels: Tensor, distance: str, scale: Any) -> Tensor:
    prototypes = torch.stack([z[labels == c].mean(0) for c in range(CLASSES)])
    if distance == "cosine":
        return scale * F.cosine_similarity(asked[:, None], prototypes[None], dim=-1)
    return -(asked[:, None] - prototypes[None]).square().sum(-1)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_it_is_the_loss_written_out(network: str, distance: str, executor: str) -> None:
    """Batch norm takes its statistics over support and query together."""
    model, (x, y), (query_x, query_y) = made(network)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.1, 0.5, 0.7]).double()
    buffers = [b.clone() for b in model.buffers()]
    out = fastmeta.prototypical_step(
        model, (x, y), (query_x, query_y), distance=distance, scale=scale, task_weights=weights,
        executor=executor,
    )  # fmt: skip
    assert all(map(torch.equal, buffers, model.buffers()))
    losses: list[Tensor] = []
    for task in range(TASKS):
        z = model(torch.cat([x[task], query_x[task]]))
        n = len(x[task])
        found = scores(z[:n], z[n:], y[task], distance, scale)
        torch.testing.assert_close(out.query_outputs[task], found.detach(), **CLOSE)
        losses.append(F.cross_entropy(found, query_y[task]))
    torch.testing.assert_close(out.task_losses, torch.stack(losses).detach(), **CLOSE)
    leaves = [*model.parameters(), scale]
    expected = torch.autograd.grad(weights @ torch.stack(losses), leaves, allow_unused=True)
    ours = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, **CLOSE)


def test_tasks_of_different_sizes() -> None:
    model, (x, y), (query_x, query_y) = made("mlp")
    sizes = [CLASSES * SHOTS, CLASSES * SHOTS - 1, CLASSES * SHOTS]
    order = y.argsort(dim=1)
    x, y = x.gather(1, order[..., None].expand_as(x)), y.gather(1, order)
    support = [(x[i, :n], y[i, :n]) for i, n in enumerate(sizes)]
    query = [(query_x[i, : 3 + i], query_y[i, : 3 + i]) for i in range(TASKS)]
    out = fastmeta.Prototypical(model)(support, query)
    for task in range(TASKS):
        z, asked = model(support[task][0]), model(query[task][0])
        found = scores(z, asked, support[task][1], "euclidean", None)
        torch.testing.assert_close(out.query_outputs[task], found.detach(), **CLOSE)
        loss = F.cross_entropy(found, query[task][1]).detach()
        torch.testing.assert_close(out.task_losses[task], loss, **CLOSE)


def test_a_learned_scale_is_registered() -> None:
    learner = fastmeta.Prototypical(
        nn.Linear(2, 2), distance="cosine", scale=nn.Parameter(torch.tensor(5.0))
    )
    assert "scale" in dict(learner.named_parameters())


def test_refusals() -> None:
    model, (x, y), (query_x, query_y) = made("mlp")
    with pytest.raises(ValueError, match="distance: 'manhattan'"):
        fastmeta.prototypical_step(model, (x, y), (query_x, query_y), distance="manhattan")
    lacking = y.clone()
    lacking[1][lacking[1] == 2] = 0
    with pytest.raises(ValueError, match="support_y: task 1 has no example of class 2"):
        fastmeta.prototypical_step(model, (x, lacking), (query_x, query_y))
    with pytest.raises(ValueError, match="a negative label"):
        fastmeta.prototypical_step(model, (x, y), (query_x, query_y - 9))
    with pytest.raises(TypeError, match="query_y: a Tensor"):
        fastmeta.prototypical_step(model, (x, y), (query_x, query_y.float()))
