"""`reptile_step` against torch.optim by hand, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.inner import SGD, Adam

TASKS, STEPS, RATE = 4, 3, 0.1
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 9, 3),
        ),
        (1, 6, 6),
    ),
}
RULES: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "descent": (None, lambda p: torch.optim.SGD(p, RATE)),
    "momentum": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, RATE, momentum=0.9)),
    "adam": (Adam(betas=(0.0, 0.999)), lambda p: torch.optim.Adam(p, RATE, betas=(0.0, 0.999))),
}


def made(network: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    build, shape = NETWORKS[network]
    data = torch.randn(TASKS, STEPS, 5, *shape).double(), torch.randint(3, (TASKS, STEPS, 5))
    return build().double(), data


def by_hand(
    model: nn.Module, data: tuple[Tensor, Tensor], optimizer: Any, weights: Tensor,
    moving: Callable[[str], bool] = lambda name: True,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """`sum_t w_t (theta - theta_t)`, and the losses before the last step."""
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = {n: torch.zeros_like(p) for n, p in theta.items()}
    losses: list[Tensor] = []
    for task in range(TASKS):
        copied = copy.deepcopy(model)
        optim = optimizer([p for n, p in copied.named_parameters() if moving(n)])
        for step in range(STEPS):
            optim.zero_grad()
            loss = F.cross_entropy(copied(data[0][task, step]), data[1][task, step])
            loss.backward()
            optim.step()
        losses.append(loss.detach())
        for name, p in copied.named_parameters():
            found[name] += weights[task] * (theta[name] - p.detach())
    return found, torch.stack(losses)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("executor", ["auto", "generic", "layered"])
def test_the_gradient_is_the_way_the_parameters_went(network, rule, executor) -> None:
    """Each inner step has a mini-batch of its own; tasks have weights."""
    model, data = made(network)
    weights = torch.tensor([0.1, 0.5, 0.0, 0.9]).double()
    expected, losses = by_hand(model, data, RULES[rule][1], weights)
    out = fastmeta.reptile_step(
        model, data, inner_lr=RATE, inner_steps=STEPS, inner_optimizer=RULES[rule][0],
        per_step_support=True, task_weights=weights, executor=executor,
    )  # fmt: skip
    out.loss.backward()
    torch.testing.assert_close(out.task_losses, losses, **CLOSE)
    torch.testing.assert_close(out.loss.detach(), weights @ losses, **CLOSE)
    assert out.support_losses.shape == (STEPS, TASKS)
    assert out.query_outputs is None
    for name, p in model.named_parameters():
        if rule == "adam" and network == "convolutional" and name == "0.bias":
            continue  # before batch norm its gradient is rounding, of which Adam makes a step
        torch.testing.assert_close(p.grad, expected[name], **CLOSE)


def test_what_does_not_adapt_gets_no_gradient() -> None:
    model, data = made("mlp")
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    expected, _ = by_hand(
        model, data, RULES["descent"][1], torch.full((TASKS,), 1 / TASKS), lambda n: n[0] == "2"
    )
    out = fastmeta.Reptile(
        model, inner_lr=rate, inner_steps=STEPS, adapt="2", per_step_support=True
    )(data)
    out.loss.backward()
    assert rate.grad is None
    for name, p in model.named_parameters():
        if name.startswith("2"):
            torch.testing.assert_close(p.grad, expected[name], **CLOSE)
        else:
            assert p.grad is None


def test_ragged_tasks() -> None:
    model, (x, y) = made("mlp")
    x, y = x[:, 0], y[:, 0]
    ragged = [(x[i, : 2 + i], y[i, : 2 + i]) for i in range(3)]
    out = fastmeta.reptile_step(model, ragged, inner_lr=RATE, inner_steps=2)
    found = torch.autograd.grad(out.loss, [*model.parameters()])
    each = [
        torch.autograd.grad(
            fastmeta.reptile_step(
                model, (a[None], b[None]), inner_lr=RATE, inner_steps=2, executor="generic"
            ).loss,
            [*model.parameters()],
        )
        for a, b in ragged
    ]
    for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs).mean(0), **CLOSE)


def test_the_model_is_not_changed_and_no_grad_gives_the_loss_alone() -> None:
    model, data = made("convolutional")
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"inner_steps": STEPS, "per_step_support": True}
    loss = fastmeta.reptile_step(model, data, **options).loss
    with torch.no_grad():
        alone = fastmeta.reptile_step(model, data, **options).loss
    with torch.inference_mode():
        inferred = fastmeta.reptile_step(model, data, **options).loss
    assert loss.requires_grad
    assert not alone.requires_grad
    assert torch.equal(loss, alone)
    assert torch.equal(loss, inferred)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_step_moves_nothing() -> None:
    model, (x, y) = made("mlp")
    with pytest.raises(ValueError, match="inner_steps: 0, which moves no parameter"):
        fastmeta.reptile_step(model, (x[:, 0], y[:, 0]), inner_steps=0)
