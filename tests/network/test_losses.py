"""The standard losses, however they are given."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.network.losses.recognition import recognise

EPS = 0.1
WEIGHT = torch.tensor([1.0, 2.0, 3.0])


def _plain(prediction, target):
    return F.mse_loss(prediction, target)


def _smoothed(prediction, target):
    return F.cross_entropy(prediction, target, label_smoothing=EPS)


def _closure(delta: float):
    return lambda p, t: F.huber_loss(p, t, delta=delta)


def _global_tensor(p, t):
    return F.cross_entropy(p, t, weight=WEIGHT)


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (F.cross_entropy, "cross_entropy"),
        (nn.CrossEntropyLoss(), "cross_entropy"),
        (functools.partial(F.cross_entropy, label_smoothing=0.2),
         "cross_entropy(label_smoothing=0.2)"),
        (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
         "cross_entropy(weight=tensor, ignore_index=1)"),
        (lambda p, t: F.cross_entropy(p, t), "cross_entropy"),
        (_smoothed, "cross_entropy(label_smoothing=0.1)"),
        (_global_tensor, "cross_entropy(weight=tensor)"),
        (F.mse_loss, "mse_loss"),
        (nn.MSELoss(), "mse_loss"),
        (_plain, "mse_loss"),
        (lambda p, t: torch.nn.functional.mse_loss(input=p, target=t), "mse_loss"),
        (_closure(0.5), "huber_loss(delta=0.5)"),
        (nn.HuberLoss(delta=2.0), "huber_loss(delta=2.0)"),
        (nn.SmoothL1Loss(), "smooth_l1_loss"),
        (nn.L1Loss(), "l1_loss"),
        (nn.BCEWithLogitsLoss(), "binary_cross_entropy_with_logits"),
        (functools.partial(_plain), "mse_loss"),
    ],
)  # fmt: skip
def test_recognised(loss_fn, text: str) -> None:
    assert str(recognise(loss_fn)) == text


class _Own(nn.Module):
    def forward(self, p, t):
        return F.mse_loss(p, t)


def _hooked() -> nn.Module:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda *_: None)
    return loss


@pytest.mark.parametrize(
    "loss_fn",
    [
        functools.partial(F.cross_entropy, reduction="sum"),
        nn.MSELoss(reduction="sum"),
        lambda p, t: F.cross_entropy(p, t) * 2,
        lambda p, t: F.mse_loss(p.squeeze(-1), t),
        lambda p, t: F.binary_cross_entropy_with_logits(t, p),
        lambda p, t: F.mse_loss(p, p),
        functools.partial(F.cross_entropy, weight=torch.ones(3, requires_grad=True)),
        _Own(),
        _hooked(),
        len,
        F.nll_loss,
    ],
)
def test_not_a_standard_loss(loss_fn) -> None:
    assert recognise(loss_fn) is None


def test_a_constant_that_changes_is_read_again() -> None:
    global EPS
    first = recognise(_smoothed)
    EPS, before = 0.3, EPS
    try:
        assert str(recognise(_smoothed)) == "cross_entropy(label_smoothing=0.3)"
    finally:
        EPS = before
    assert str(recognise(_smoothed)) == str(first)
    assert str(recognise(_closure(0.5))) != str(recognise(_closure(0.7)))


@pytest.mark.parametrize(
    ("loss_fn", "labels"),
    [
        (F.cross_entropy, True),
        (nn.CrossEntropyLoss(weight=WEIGHT.double(), label_smoothing=0.1, ignore_index=0), True),
        (functools.partial(F.cross_entropy, label_smoothing=0.2), False),
        (F.mse_loss, False),
        (F.l1_loss, False),
        (nn.HuberLoss(delta=0.3), False),
        (nn.SmoothL1Loss(beta=0.4), False),
        (nn.SmoothL1Loss(beta=0.0), False),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHT.double()), False),
    ],
)
def test_weighted_is_the_mean_over_the_examples_with_weight(loss_fn, labels: bool) -> None:
    prediction = torch.randn(6, 3).double()
    target = torch.tensor([1, 2, 0, 1, 2, 1]) if labels else torch.rand(6, 3).double().softmax(-1)
    weights = torch.tensor([1, 1, 1, 1, 0, 0]).double() / 4
    loss = recognise(loss_fn)
    assert loss is not None
    expected = loss_fn(prediction[:4], target[:4])
    torch.testing.assert_close(loss.weighted(prediction, target, weights), expected)
    torch.testing.assert_close(loss(prediction, target), loss_fn(prediction, target))
