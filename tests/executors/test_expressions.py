"""Activations and losses by formula, in the fused step and the layered rules.

Held against the general path, whose derivatives are autograd's through the whole loop, in float64.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import drawn_steps
import pytest
import torch
import torch.nn.functional as F
from drawn_steps import Case
from fused_kernels import ANCHORED, KERNELS, cpu_only
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from traced_steps import By, agree, network, sets

import fastmeta

pytestmark = cpu_only

CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))
GAMMA = 1.5
SCALE = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)


class Sine(nn.Module):
    """A SIREN's, milder."""

    def __init__(self, frequency: float = 2.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "steep": lambda: By(lambda x: x * torch.sigmoid(1.7 * x)),
    "sine": Sine,
    "gaussian": lambda: By(lambda x: torch.exp(-x.square())),
    "mish": nn.Mish,
    "of one exponential": lambda: By(lambda x: F.mish(x) + F.softplus(x) * torch.sigmoid(x)),
    "softsign": nn.Softsign,
    "selu": nn.SELU,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "relu squared": lambda: By(lambda x: F.relu(x) ** 2),
    "snake": lambda: By(lambda x: x + torch.sin(2 * x) ** 2 / 2),
    "logistic": lambda: By(lambda x: torch.log1p(x * x) + 0.1 * torch.sqrt(1 + x * x)),
    "power": lambda: By(lambda x: (1 + x * x) ** -0.7 + torch.expm1(0.3 * x)),
    "two at once": lambda: nn.Sequential(nn.Tanh(), nn.SiLU()),
}


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return ((prediction - target) ** 2).mean()


def total(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.1 * (prediction - target).square().sum()


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    error = (prediction - target).abs()
    return torch.where(error < GAMMA, 0.5 * error**2, GAMMA * (error - 0.5 * GAMMA)).mean()


def quantile(prediction: Tensor, target: Tensor, q: float = 0.3) -> Tensor:
    error = target - prediction
    return torch.maximum(q * error, (q - 1) * error).mean()


def log_cosh(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.log(torch.cosh(prediction - target)).mean()


def poisson(prediction: Tensor, target: Tensor) -> Tensor:
    return F.poisson_nll_loss(prediction, target.square())


def student(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.log1p((prediction - target).square() / 3).sum(-1).mean()


def distilled(prediction: Tensor, target: Tensor) -> Tensor:
    teacher = F.softmax(target / 2, -1)
    return F.kl_div(F.log_softmax(prediction / 2, -1), teacher, reduction="batchmean")


def powers(prediction: Tensor, target: Tensor) -> Tensor:
    """By a method and a function that share their name."""
    return (prediction - target).pow(2).mean() + pow(prediction.abs() + 0.1, 1.5).mean()


def hinge(prediction: Tensor, target: Tensor) -> Tensor:
    return F.relu(1 - target.sign() * prediction).sum(1).mean() + 0.1 * prediction.square().mean()


def furthest(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs().amax(1).mean()


def weighted(prediction: Tensor, target: Tensor) -> Tensor:
    return (SCALE[:, : prediction.shape[-1]] * (prediction - target) ** 2).sum(1).mean()


def helped(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.5 * mse(prediction, target) + prediction.abs().mean()


class Gaussian(nn.Module):
    """With a deviation that is learned."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.linspace(-0.5, 0.5, outputs).double())
        self.sharpness = 0.7

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (target - prediction) * torch.exp(-self.log_std)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        z = self.error(prediction, target)
        return (self.sharpness * z.square() + self.log_std).sum(-1).mean()


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (mse, total, huber, quantile, log_cosh, poisson, student, distilled, hinge, furthest,
              powers, helped)
}  # fmt: skip


@pytest.fixture(params=ANCHORED)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_the_fused_step(name: str, kernel: str) -> None:
    out = agree(
        network(2, ACTIVATIONS[name]), sets(4, 2), sets(5, 2), [], loss_fn=F.mse_loss,
    )  # fmt: skip
    assert out.executor == "fused-cpu"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_the_layered_rules(name: str) -> None:
    agree(
        network(2, ACTIVATIONS[name]), sets(4, 2), sets(5, 2), [], "layered", loss_fn=F.mse_loss,
    )  # fmt: skip


@pytest.mark.parametrize("outputs", [1, 3, 20])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_losses(name: str, outputs: int, kernel: str) -> None:
    loss = REGRESSIONS[name]
    out = agree(network(outputs), sets(4, outputs), sets(70, outputs), [], loss_fn=loss)
    assert out.executor == "fused-cpu"


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_what_a_loss_learns(kernel: str, first_order: bool, per_step: bool) -> None:
    loss = Gaussian(3)
    support, query = sets(4, 3), sets(5, 3)
    if per_step:
        support = tuple(torch.stack([part, part.flip(0)], 1) for part in support)
    out = agree(
        network(3), support, query, [loss.log_std], loss_fn=loss, first_order=first_order,
        step_weights=[0.2, 0.3, 0.5], prox=0.1, per_step_support=per_step,
    )  # fmt: skip
    assert out.executor == "fused-cpu"


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_what_two_losses_learn(kernel: str, rule: str) -> None:
    shared = Gaussian(2)

    def sharper(prediction: Tensor, target: Tensor) -> Tensor:
        return (shared.log_std * (prediction - target).abs()).sum(1).mean()

    optimizer = {"SGD": fastmeta.inner.SGD(0.9), "Adam": fastmeta.inner.Adam(eps_root=1e-3)}[rule]
    out = agree(
        network(2), sets(4, 2), sets(5, 2), [shared.log_std], loss_fn=shared,
        query_loss_fn=sharper, inner_optimizer=optimizer,
    )  # fmt: skip
    assert out.executor == "fused-cpu-open"  # the second reads a module


def actions(tasks: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(tasks, count, 3).double(), {
        "action": torch.randint(4, (tasks, count)),
        "advantage": torch.randn(tasks, count).double(),
        "old": torch.randn(tasks, count).double() - 1.5,
    }


def clipped(prediction: Tensor, given: dict[str, Tensor]) -> Tensor:
    logp = F.log_softmax(prediction, -1).gather(1, given["action"][:, None])[:, 0]
    ratio = torch.exp(logp - given["old"])
    advantage = given["advantage"]
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def focal(prediction: Tensor, label: Tensor) -> Tensor:
    each = F.cross_entropy(prediction, label, reduction="none")
    return ((1 - torch.exp(-each)) ** GAMMA * each).mean()


def normal(prediction: Tensor, target: Tensor) -> Tensor:
    mean, deviation = prediction.chunk(2, -1)
    policy = torch.distributions.Normal(mean, F.softplus(deviation) + 0.1, validate_args=False)
    return -policy.log_prob(target).sum(-1).mean()


def test_targets_of_several_tensors(kernel: str) -> None:
    out = agree(network(4), actions(5, 4), actions(5, 6), [], loss_fn=clipped)
    assert out.executor == "fused-cpu"


def test_labels(kernel: str) -> None:
    x, y = sets(4, 1)[0], torch.randint(5, (5, 4))
    out = agree(network(5), (x, y), (x.flip(0), y.flip(0)), [], loss_fn=focal)
    assert out.executor == "fused-cpu"


def test_a_deviation_that_is_predicted(kernel: str) -> None:
    out = agree(network(6), sets(4, 3), sets(5, 3), [], loss_fn=normal)
    assert out.executor == "fused-cpu"


def test_another_loss_on_the_query_set(kernel: str) -> None:
    x, y = sets(4, 1)[0], torch.randint(3, (5, 4))
    for losses in ((mse, focal), (F.mse_loss, focal), (mse, F.cross_entropy)):
        out = agree(network(3), sets(4, 3), (x, y), [], loss_fn=losses[0], query_loss_fn=losses[1])
        assert out.executor == "fused-cpu"


def test_labels_that_are_no_classes_are_left_to_torch() -> None:
    x, y = sets(4, 1)[0], torch.randint(3, (5, 4))
    batch = x, y.where(y > 0, -100)

    def scaled(prediction: Tensor, label: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(prediction, label)

    model = network(3)
    first = agree(model, (x, y), (x, y), [], loss_fn=scaled, executor="auto")
    assert first.executor == "fused-cpu"
    agree(model, batch, batch, [], loss_fn=scaled, executor="auto")


def test_constants_are_arguments_of_a_step() -> None:
    model, batch = network(2), sets(4, 2)

    def step(scale: float, shift: Tensor) -> Any:
        return agree(
            model, batch, batch, [],
            loss_fn=lambda p, y: scale * ((p - y + shift) ** 2).mean(),
        )  # fmt: skip

    losses = [step(s, torch.full((2,), s).double()).loss.item() for s in (0.5, 2.0, 0.5)]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_zero_keeps_its_sign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in KERNELS[name].items():
        monkeypatch.setenv(variable, value)
    model, batch = network(2), sets(4, 2)
    for zero in (0.0, -0.0):

        def signed(prediction: Tensor, target: Tensor, zero: float = zero) -> Tensor:
            error = prediction - target
            above = (1 + error.square()) / zero > 0
            return torch.where(above, error.square(), error.abs()).mean()

        agree(model, batch, batch, [], loss_fn=signed)


def square_of_the_mean(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).mean() ** 2


def counted(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / len(target)


def branching(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean() if target.mean() < 9 else prediction.mean()


def gathering(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction @ target.T).mean()


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (square_of_the_mean, "computes power of a mean over examples"),
        (counted, "computes with the number of examples"),
        (branching, "computes less of a mean over examples"),
        (gathering, "can't be traced|no expression has|reads"),
    ],
)
def test_what_is_no_expression_says_why(loss: Any, why: str) -> None:
    model, batch = network(2), sets(4, 2)
    out = agree(model, batch, batch, [], loss_fn=loss, executor="auto")
    assert out.executor != "fused-cpu"
    assert re.search(why, fastmeta.explain(model, batch, batch, loss_fn=loss))


@settings(
    max_examples=CASES or 60, derandomize=CASES == 0, deadline=None, print_blob=True,
    suppress_health_check=[*HealthCheck], phases=[Phase.generate],
)  # fmt: skip
@given(
    case=drawn_steps.cases,
    loss=st.sampled_from([*REGRESSIONS, "learned", "standard"]),
    between=st.sampled_from([*ACTIVATIONS]),
    name=st.sampled_from([*KERNELS]),
)
def test_drawn_steps(
    case: Case, loss: str, between: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in KERNELS[name].items():
        monkeypatch.setenv(variable, value)
    case = replace(case, loss="mse", probabilities=False, ragged=False, query_loss=False)
    drawn = drawn_steps.draw(case)
    for place, layer in enumerate(drawn.model):
        if isinstance(layer, (nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU)):
            drawn.model[place] = ACTIVATIONS[between]()
    learned = Gaussian(case.widths[-1])
    loss_fn = {"learned": learned, "standard": F.mse_loss, **REGRESSIONS}[loss]
    leaves = drawn.leaves() + ([learned.log_std] if loss == "learned" else [])
    found: list[Any] = []
    for executor in ("fused", "generic"):
        options = {**drawn.options(), "loss_fn": loss_fn, "executor": executor}
        out = fastmeta.maml_step(drawn.model, drawn.support, drawn.query, **options)
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g
                  for p, g in zip(leaves, grads, strict=True)]  # fmt: skip
        found.append((out, filled))
    (ours, gradients), (theirs, expected) = found
    torch.testing.assert_close(ours.task_losses, theirs.task_losses)
    apart = max(
        float((a - b).norm() / b.norm().clamp(min=1e-2))
        for a, b in zip(gradients, expected, strict=True)
    )
    note(f"gradients apart by {apart:.3g}")
    assert apart < 1e-8


def run_the_page(name: str) -> dict[str, Any]:
    page = Path(__file__).parents[2] / "docs" / name
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, page.name, "exec"), names)
    return names


def test_the_page_of_losses_shows_what_runs() -> None:
    names = run_the_page("losses.md")
    assert names["out"].executor == "fused-cpu"
    for leaf in (names["log_std"], *names["policy"].parameters()):
        assert leaf.grad.abs().sum() > 0


def test_a_chaotic_network_is_not_refused() -> None:
    torch.manual_seed(0)
    widths = (2, 64, 64, 64, 64, 3)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), Sine(30.0))]
    model, batch = nn.Sequential(*layers[:-1]), (torch.randn(4, 64, 2), torch.randn(4, 64, 3))
    out = fastmeta.maml_step(model, batch, batch, inner_steps=2, loss_fn=F.mse_loss)
    assert out.executor == "fused-cpu"


def bits(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction * (target & 2)).mean()


def joined(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.square() * ((target > 0) + (prediction > 0))).mean()


def banded(prediction: Tensor, target: Tensor) -> Tensor:
    inside = (prediction > -0.5) & ~(prediction > target) | (target < 0)
    return torch.where(inside, prediction.square(), prediction.abs()).mean()


@pytest.mark.parametrize(("loss", "traced"), [(bits, False), (joined, False), (banded, True)])
def test_conditions_are_no_numbers(loss: Any, traced: bool) -> None:
    model, (x, y) = network(2), sets(6, 2)
    batch = x, (4 * y).long() if loss is bits else y
    out = agree(model, batch, batch, [], loss_fn=loss, executor="auto")
    assert (out.executor == "fused-cpu") == traced


def test_arithmetic_of_integers_is_left_to_torch() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.embedding(x // 2 + 1))

    batch = torch.randint(8, (4, 5)), torch.randint(3, (4, 5))
    agree(Shifted().double(), batch, batch, [], loss_fn=F.cross_entropy, executor="auto")
