"""Likelihoods of counts and of heavy tails, and largest columns, in the fused step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused_kernels import cpu_only
from torch import Tensor, nn
from traced_steps import agree, network

import fastmeta

pytestmark = cpu_only


def negative_binomial(prediction: Tensor, target: Tensor) -> Tensor:
    """Counts by torch.distributions, of a count of failures that is a number."""
    made = torch.distributions.NegativeBinomial(2.5, logits=prediction, validate_args=False)
    return -made.log_prob(target).mean()


def of_mean_and_spread(prediction: Tensor, target: Tensor) -> Tensor:
    """Both numbers of it are predicted."""
    mean, inverse = F.softplus(prediction[:, :1]) + 0.1, F.softplus(prediction[:, 1:2]) + 0.1
    count = 1 / inverse
    chance = count / (count + mean)
    found = torch.lgamma(target + count) - torch.lgamma(count) - torch.lgamma(target + 1)
    return -(found + count * torch.log(chance) + target * torch.log(1 - chance)).mean()


def poisson(prediction: Tensor, target: Tensor) -> Tensor:
    return (
        -torch.distributions.Poisson(prediction.exp(), validate_args=False).log_prob(target).mean()
    )


def gamma(prediction: Tensor, target: Tensor) -> Tensor:
    shape, value = F.softplus(prediction) + 0.2, target + 0.5
    found = torch.xlogy(shape - 1, value) - 1.5 * value + shape * math.log(1.5)
    return -(found - torch.lgamma(shape)).mean()


def student(prediction: Tensor, target: Tensor) -> Tensor:
    """With its degrees of freedom predicted."""
    freedom = F.softplus(prediction[:, 1:]) + 1
    error = (target[:, :1] - prediction[:, :1]) / 0.7
    found = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * freedom.log()
    return -(found - (freedom + 1) / 2 * torch.log1p(error.square() / freedom)).mean()


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.max(1).values - prediction.min(dim=1)[0] * target[:, 0]).mean()


def of_the_first(prediction: Tensor, target: Tensor) -> Tensor:
    """Of equal columns the first alone has a derivative."""
    largest, _ = torch.maximum(prediction, prediction[:, :1].detach()).max(-1, keepdim=True)
    return (largest - target[:, :1]).square().mean()


def of_the_best(prediction: Tensor, target: Tensor) -> Tensor:
    best = target.argmax(1, keepdim=True)
    return -F.log_softmax(prediction, 1).gather(1, best).mean()


def gamma_of_one(prediction: Tensor, target: Tensor) -> Tensor:
    """Where the shape less one is 0 its derivative is a logarithm, where that is finite."""
    shape = prediction.clamp(0, 2)
    return (torch.xlogy(shape, target + 0.5) + 0.1 * prediction.square()).mean()


def xlogy_at_nothing(prediction: Tensor, target: Tensor) -> Tensor:
    """At 0 the derivative is the logarithm where there is one, else nothing."""
    nothing = prediction - prediction.detach()
    return (torch.xlogy(nothing, target - 1) + 0.1 * prediction.square()).mean()


COUNTS = [negative_binomial, poisson, gamma]
LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    *COUNTS, gamma_of_one, xlogy_at_nothing, of_mean_and_spread, student, margin, of_the_best,
    of_the_first,
]  # fmt: skip


def sets(loss: Callable[..., Tensor], count: int, outputs: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, 7, (5, count, outputs)).double()
    x = torch.randn(5, count, 3).double()
    if loss is of_mean_and_spread:
        y = y[..., :1]
    return x, y + torch.rand_like(y) if loss in (student, margin, of_the_best) else y


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    out = agree(network(3), sets(loss, 4, 3), sets(loss, 5, 3), [], loss_fn=loss)
    assert out.executor == "fused-cpu"


class Learned(nn.Module):
    """A negative binomial whose count of failures is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_count = nn.Parameter(torch.tensor([0.3, -0.2, 1.1]).double())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        count = self.log_count.exp()
        found = torch.lgamma(count + target) - torch.lgamma(count) - torch.lgamma(1 + target)
        found = found + count * F.logsigmoid(-prediction) + target * F.logsigmoid(prediction)
        return -found.sum(1).mean()


@pytest.mark.parametrize("first_order", [False, True])
def test_a_learned_count(first_order: bool) -> None:
    loss = Learned()
    out = agree(
        network(3), sets(loss, 4, 3), sets(loss, 5, 3), [loss.log_count], loss_fn=loss,
        first_order=first_order,
    )  # fmt: skip
    assert out.executor == "fused-cpu"


def test_a_gamma_function_between_layers() -> None:
    class LogGamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(1 + x * x)

    out = agree(
        network(2, LogGamma), sets(student, 4, 2), sets(student, 5, 2), [], loss_fn=F.mse_loss
    )
    assert out.executor == "fused-cpu"


def test_what_is_no_number_is_the_largest() -> None:
    x, y = sets(margin, 4, 3)
    x[1, 2] = torch.nan
    model = network(3)
    losses = [
        fastmeta.maml_step(model, (x, y), (x, y), loss_fn=margin, executor=name).task_losses
        for name in ("fused", "generic")
    ]
    torch.testing.assert_close(*losses, equal_nan=True)


def test_a_digamma_is_left_to_torch() -> None:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (torch.digamma(1 + prediction.square()) - target).square().mean()

    data = sets(loss, 4, 3), sets(loss, 5, 3)
    assert agree(network(3), *data, [], loss_fn=loss).executor == "fused-cpu-open"


def test_a_column_that_there_is_not_is_left_to_torch() -> None:
    """The largest of more columns than are picked from."""

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return prediction.gather(1, target.argmax(1, keepdim=True)).square().mean()

    model, (x, y) = network(3), sets(margin, 4, 4)
    y[..., 3:] = -1  # places of the first three columns at first
    agree(model, (x, y), (x, y), [], "auto", loss_fn=loss)
    y[0, 0, 3] = 9
    with pytest.raises((RuntimeError, IndexError)):
        fastmeta.maml_step(model, (x, y), (x, y), loss_fn=loss)
