"""`imaml_step` against a dense solve at the adapted parameters, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from fastmeta.inner import Adam

TASKS, STEPS, RATE, PROX = 3, 4, 0.1, 2.0
CLOSE = {"rtol": 1e-7, "atol": 1e-9}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(3 * 4, 3),
        ),
        (1, 4, 4),
    ),
}


def made(network: str, *front: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(2)
    build, shape = NETWORKS[network]

    def drawn(*sizes: int) -> tuple[Tensor, Tensor]:
        return torch.randn(*sizes, *shape).double(), torch.randint(3, sizes)

    return build().double(), drawn(TASKS, *front, 5), drawn(TASKS, 7)


def dense(
    model: nn.Module, at: dict[str, Tensor], support: Any, query: Any, moving: list[str]
) -> dict[str, Tensor]:
    """The implicit gradient of one task, by the whole Hessian of all parameters."""
    names, sizes = [*at], [p.numel() for p in at.values()]
    flat = torch.cat([p.flatten() for p in at.values()])

    def loss(flat: Tensor, data: Any) -> Tensor:
        parts = flat.split(sizes)
        named = {n: part.view_as(at[n]) for n, part in zip(names, parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, data[0]), data[1])

    hessian = torch.autograd.functional.hessian(lambda p: loss(p, support), flat)
    gradient = torch.autograd.functional.jacobian(lambda p: loss(p, query), flat)
    moves = torch.cat(
        [torch.full((n,), name in moving) for name, n in zip(names, sizes, strict=True)]
    )
    inner = hessian[moves][:, moves]
    solved = torch.linalg.solve(torch.eye(len(inner)).double() + inner / PROX, gradient[moves])
    found = gradient.clone()
    found[moves] = solved
    found[~moves] -= hessian[~moves][:, moves] @ solved / PROX
    parts = found.split(sizes)
    return {n: part.view_as(at[n]) for n, part in zip(names, parts, strict=True)}


def expected(
    model: nn.Module, support: Any, query: Any, moving: list[str], last: Any = None, **options: Any
) -> dict[str, Tensor]:
    """The mean over tasks, at the parameters that the generic executor adapts."""
    adapted = fastmeta.adapt(
        model, support, prox=PROX, inner_lr=RATE, inner_steps=STEPS, executor="generic", **options
    ).parameters
    theta = {n: p.detach() for n, p in model.named_parameters()}
    each = [
        dense(model, {n: adapted[n][i] if n in adapted else p for n, p in theta.items()},
              (sx, sy), (qx, qy), moving)
        for i, (sx, sy, qx, qy) in enumerate(oracle.split(last or support, query))
    ]  # fmt: skip
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in theta}


def check(model: nn.Module, out: Any, gradients: dict[str, Tensor]) -> None:
    out.loss.backward()
    assert out.residuals[-1].max() < 1e-8
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], **CLOSE)


@pytest.mark.parametrize("executor", ["auto", "generic", "layered"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_is_that_of_a_dense_solve(network: str, executor: str) -> None:
    model, support, query = made(network)
    names = [name for name, _ in model.named_parameters()]
    out = fastmeta.imaml_step(
        model, support, query, prox=PROX, cg_steps=60, inner_lr=RATE, inner_steps=STEPS,
        executor=executor,
    )  # fmt: skip
    check(model, out, expected(model, support, query, names))
    assert out.residuals.shape == (61, TASKS)


def test_what_does_not_adapt_moves_the_minimum() -> None:
    model, support, query = made("mlp")
    learner = fastmeta.IMAML(
        model, prox=PROX, cg_steps=60, inner_lr=RATE, inner_steps=STEPS, adapt="2"
    )
    gradients = expected(model, support, query, ["2.weight", "2.bias"], adapt="2")
    check(model, learner(support, query), gradients)


def test_the_hessian_is_of_the_last_steps_set_and_any_rule_leads_there() -> None:
    model, support, query = made("mlp", STEPS)
    options: dict[str, Any] = {"per_step_support": True, "inner_optimizer": Adam()}
    last = tuple(leaf[:, -1] for leaf in support)
    names = [name for name, _ in model.named_parameters()]
    out = fastmeta.imaml_step(
        model, support, query, prox=PROX, cg_steps=60, inner_lr=RATE, inner_steps=STEPS, **options
    )
    check(model, out, expected(model, support, query, names, last, **options))


def test_at_the_minimum_it_is_mamls() -> None:
    """After many steps the unrolled gradient through all of them is the implicit one."""
    model, support, query = made("mlp")
    options: dict[str, Any] = {"prox": PROX, "inner_lr": 0.2, "inner_steps": 150}
    implicit = fastmeta.imaml_step(model, support, query, cg_steps=60, **options)
    unrolled = fastmeta.maml_step(model, support, query, **options)
    parameters = [*model.parameters()]
    torch.testing.assert_close(implicit.loss.detach(), unrolled.loss.detach(), **CLOSE)
    pairs = zip(
        torch.autograd.grad(implicit.loss, parameters),
        torch.autograd.grad(unrolled.loss, parameters),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_ragged_tasks_and_weights() -> None:
    model, (x, y), (query_x, query_y) = made("mlp")
    support = [(x[i, : 3 + i % 2], y[i, : 3 + i % 2]) for i in range(TASKS)]
    query = [(query_x[i, : 5 + i % 2], query_y[i, : 5 + i % 2]) for i in range(TASKS)]
    weights = torch.tensor([0.2, 0.7, 0.4]).double()
    options: dict[str, Any] = {"prox": PROX, "inner_lr": RATE, "inner_steps": 2, "cg_steps": 3}
    out = fastmeta.imaml_step(model, support, query, task_weights=weights, **options)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(TASKS):
        one = fastmeta.imaml_step(
            model, tuple(t[None] for t in support[i]), tuple(t[None] for t in query[i]), **options
        )
        torch.testing.assert_close(out.query_outputs[i], one.query_outputs[0], **CLOSE)
        torch.testing.assert_close(out.residuals[:, i], one.residuals[:, 0], **CLOSE)
        for sum_, g in zip(
            total, torch.autograd.grad(one.loss, [*model.parameters()]), strict=True
        ):
            sum_ += weights[i] * g
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, [*model.parameters()]), total, strict=True
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_task_without_a_residual_stays() -> None:
    """Labels that a constant model has right by weight zero: the query gradient is nothing."""
    model, support, (query_x, query_y) = made("mlp")
    query_y = query_y.clone()
    query_y[1] = -100  # no label counts: the loss is no number, its gradient nothing
    loss = nn.CrossEntropyLoss(reduction="sum")

    def summed(prediction: Tensor, target: Tensor) -> Tensor:
        return loss(prediction, target) / 7

    out = fastmeta.imaml_step(
        model, support, (query_x, query_y), prox=PROX, query_loss_fn=summed, inner_steps=2
    )
    assert out.residuals[1:, 1].eq(0).all()
    gradients = torch.autograd.grad(out.loss, [*model.parameters()])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prox": 0.0}, ValueError, "prox: 0.0; it must be above 0"),
        ({"prox": "2"}, TypeError, "prox: a str"),
        ({"prox": 1.0, "cg_steps": -1}, ValueError, "cg_steps: -1"),
        ({"prox": 1.0, "cg_steps": 1.5}, TypeError, "cg_steps: a float"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, support, query = made("mlp")
    with pytest.raises(error, match=message):
        fastmeta.imaml_step(model, support, query, **options)


def test_a_wrong_label_is_named_where_it_stands() -> None:
    model, support, (query_x, query_y) = made("mlp")
    with pytest.raises(ValueError, match="query_y: label 9 at"):
        fastmeta.imaml_step(model, support, (query_x, query_y.clamp(9)), prox=PROX)
    wrong = support[0], support[1].clamp(9)
    with pytest.raises(ValueError, match="support_y: label 9 at"):
        fastmeta.imaml_step(model, wrong, (query_x, query_y), prox=PROX)


def test_autocast_does_not_round_the_solution() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(torch.randn(2, 5, 4), torch.randint(3, (2, 5))) for _ in "sq"]
    with torch.autocast("cpu", torch.bfloat16):
        out = fastmeta.imaml_step(model, *data, prox=PROX, cg_steps=3)
    assert out.residuals.dtype == torch.float32


def test_no_grad_gives_the_loss_alone() -> None:
    model, support, query = made("mlp")
    with torch.no_grad():
        out = fastmeta.imaml_step(model, support, query, prox=PROX)
    assert not out.loss.requires_grad
    assert out.residuals.shape == (0, TASKS)
