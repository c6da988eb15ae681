"""Weighted losses and class probabilities in the fused step, against the float64 oracle."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, FUSED, KERNELS

CLASSES = 4


def network(last: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers, *([last] if last else [])).double()


def inputs(tasks: int, count: int) -> Tensor:
    return torch.randn(tasks, count, 3).double()


def labels(tasks: int, count: int) -> Tensor:
    return torch.randint(CLASSES, (tasks, count))


def rows(tasks: int, count: int) -> Tensor:
    return torch.rand(tasks, count, CLASSES).double()


def agrees(
    model: nn.Module, support: Any, query: Any, loss_fn: Any, isa: str = "", steps: int = 3,
    **options: Any,
) -> None:  # fmt: skip
    leaves = list(model.parameters())
    reference = oracle.maml(
        model, oracle.split(support, query), leaves,
        rate=lambda name, step: 0.2, steps=steps, loss_fn=loss_fn, **options,
    )  # fmt: skip
    with mock.patch.dict(os.environ, KERNELS.get(isa, {})):
        out = fastmeta.maml_step(
            model, support, query,
            inner_lr=0.2, inner_steps=steps, loss_fn=loss_fn, executor="fused", **options,
        )  # fmt: skip
    assert out.executor == FUSED
    torch.testing.assert_close(
        out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12, equal_nan=True
    )
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


sets = st.sampled_from(list(KERNELS))
counts = st.tuples(st.integers(1, 18), st.integers(1, 6), st.integers(1, 6))
drawn = settings(max_examples=60, deadline=None, derandomize=True)


@drawn
@given(
    isa=sets,
    sizes=counts,
    weights=st.none() | st.tuples(*[st.sampled_from([0.25, 1.0, 3.5])] * CLASSES),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    ignore=st.sampled_from([-100, 0, 2]),
    first_order=st.booleans(),
)
def test_classes_have_weights(isa, sizes, weights, smoothing, ignore, first_order) -> None:
    tasks, support, query = sizes
    weight = None if weights is None else torch.tensor(weights).double()
    loss_fn = nn.CrossEntropyLoss(weight, ignore_index=ignore, label_smoothing=smoothing)
    data = [(inputs(tasks, n), labels(tasks, n)) for n in (support, query)]
    for _, y in data:
        y[:, 0] = 1  # at least one that is not ignored
    agrees(network(), *data, loss_fn, isa, first_order=first_order)


@drawn
@given(
    isa=sets,
    sizes=counts,
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    sums_to_one=st.booleans(),
)
def test_probabilities_of_classes(isa, sizes, weighted, smoothing, sums_to_one) -> None:
    tasks, support, query = sizes
    weight = torch.tensor([0.5, 1.0, 0.0, 3.0]).double() if weighted else None
    loss_fn = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    data = [(inputs(tasks, n), rows(tasks, n)) for n in (support, query)]
    if sums_to_one:
        data = [(x, y / y.sum(-1, keepdim=True)) for x, y in data]
    data[0][1][0, 0] = 0  # a row of no mass
    agrees(network(), *data, loss_fn, isa)


SHAPES = ((), (1,), (CLASSES,), (1, CLASSES), (5, 1), (5, CLASSES))


@drawn
@given(
    isa=sets,
    tasks=st.integers(1, 18),
    weight=st.none() | st.sampled_from(SHAPES),
    pos_weight=st.none() | st.sampled_from(SHAPES),
    first_order=st.booleans(),
)
def test_weights_of_predictions(isa, tasks, weight, pos_weight, first_order) -> None:
    loss_fn = nn.BCEWithLogitsLoss(
        None if weight is None else torch.rand(weight).double() + 0.5,
        pos_weight=None if pos_weight is None else 3 * torch.rand(pos_weight).double(),
    )
    data = [(inputs(tasks, 5), rows(tasks, 5).round() if i else rows(tasks, 5)) for i in range(2)]
    agrees(network(), *data, loss_fn, isa, first_order=first_order)


@pytest.mark.parametrize("isa", ANCHORED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Softplus(), nn.ReLU()], ids=str)
def test_cross_entropy_after_an_activation(activation, weighted: bool, isa: str) -> None:
    data = [(inputs(3, n), labels(3, n)) for n in (4, 6)]
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0]).double() if weighted else None
    agrees(network(activation), *data, nn.CrossEntropyLoss(weight), isa)


@pytest.mark.parametrize("isa", ANCHORED)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_set_of_ignored_labels_is_torchs_mean_of_nothing(weighted: bool, isa: str) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0]).double() if weighted else None
    loss_fn = nn.CrossEntropyLoss(weight, ignore_index=0)
    data = [(inputs(2, n), labels(2, n).clamp_min(1)) for n in (4, 6)]
    data[0][1][0] = 0
    with mock.patch.dict(os.environ, KERNELS.get(isa, {})):
        fused, general = (
            fastmeta.maml_step(network_of_ones(), *data, loss_fn=loss_fn, executor=executor)
            for executor in ("fused", "generic")
        )
    assert fused.support_losses[0, 0].isnan()
    torch.testing.assert_close(
        fused.support_losses, general.support_losses, equal_nan=True, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(fused.task_losses, general.task_losses, rtol=1e-12, atol=0)


def network_of_ones() -> nn.Sequential:
    torch.manual_seed(1)
    return network()


def test_padded_tasks_are_weighed_by_their_own_labels(force_form) -> None:
    force_form("fused")
    loss_fn = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), label_smoothing=0.1)
    pairs = [
        [(inputs(1, n)[0], labels(1, n)[0]) for n in counts] for counts in ((2, 4, 3), (5, 1, 2))
    ]
    model = network()
    leaves = list(model.parameters())
    reference = oracle.maml(
        model, [(*s, *q) for s, q in zip(*pairs, strict=True)], leaves,
        rate=lambda name, step: 0.2, steps=2, loss_fn=loss_fn,
    )  # fmt: skip
    out = fastmeta.maml_step(model, *pairs, inner_lr=0.2, inner_steps=2, loss_fn=loss_fn)
    for got, expected in zip(
        torch.autograd.grad(out.loss, leaves), reference.gradients, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_weights_that_change_in_place_are_read_again() -> None:
    weight = torch.ones(CLASSES).double()
    loss_fn = nn.CrossEntropyLoss(weight)
    model, data = network(), [(inputs(2, n), labels(2, n)) for n in (4, 6)]
    agrees(model, *data, loss_fn)
    weight[1] = 5.0
    agrees(model, *data, loss_fn)


def test_weights_of_another_dtype_are_left_to_the_general_path() -> None:
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES))
    data = [(inputs(2, n), rows(2, n)) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"the loss.s weights are torch\.float32"):
        fastmeta.maml_step(network(), *data, loss_fn=loss_fn, executor="fused")
    assert fastmeta.maml_step(network(), *data, loss_fn=loss_fn).executor == "generic"


def test_weights_of_another_number_of_examples_are_refused() -> None:
    loss_fn = nn.BCEWithLogitsLoss(torch.ones(4, 1).double())
    data = [(inputs(2, n), rows(2, n)) for n in (4, 6)]
    with pytest.raises(ValueError, match=r"weights \[4, 1\] don't broadcast to \[6, 4\]"):
        fastmeta.maml_step(network(), *data, loss_fn=loss_fn, executor="fused")


def test_float32_is_as_close_as_its_rounding_allows() -> None:
    model = network()
    data = [(inputs(5, n), labels(5, n)) for n in (5, 15)]
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    leaves = list(model.parameters())
    exact = oracle.maml(
        model, oracle.split(*data), leaves, rate=lambda name, step: 0.1, steps=3,
        loss_fn=lambda p, y: F.cross_entropy(p, y, weight.double(), label_smoothing=0.1),
    )  # fmt: skip
    single = model.float()
    out = fastmeta.maml_step(
        single, *[(x.float(), y) for x, y in data], inner_lr=0.1, inner_steps=3, executor="fused",
        loss_fn=nn.CrossEntropyLoss(weight, label_smoothing=0.1),
    )  # fmt: skip
    # Sums of at most 15 terms, 2 layers and the loss, 3 steps forward and back.
    tolerance = 3 * 2 * 3 * 15**0.5 * torch.finfo(torch.float32).eps
    for got, wanted in zip(
        torch.autograd.grad(out.loss, list(single.parameters())), exact.gradients, strict=True
    ):
        assert (got - wanted).norm() <= tolerance * wanted.norm()
