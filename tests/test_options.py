"""Every option of `maml_step`, alone and drawn together, by every form, against the oracle."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import rates
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rates import learned
from torch import Tensor, nn

import fastmeta

FORMS = ("vmap", "loop", "sweep", "fused")
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
HEAD = ("4.weight", "4.bias")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


def shapes(names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in network().named_parameters() if name in names}


def data(tasks: int = 3, support: int = 4, query: int = 5) -> tuple[Any, Any]:
    def pair(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, count, 3).double(), torch.randint(2, (tasks, count))

    return pair(support), pair(query)


def agree(
    model: nn.Module,
    support: Any,
    query: Any,
    leaves: list[Tensor],
    oracle_options: dict[str, Any],
    **options: Any,
) -> None:
    """Loss, task losses and the gradients of every parameter and leaf agree to 1e-9."""
    leaves = [p for p in model.parameters() if p.requires_grad] + leaves
    for leaf in leaves:
        leaf.grad = None
    reference = oracle.maml(model, oracle.split(support, query), leaves, **oracle_options)
    out = fastmeta.maml_step(model, support, query, **options)
    torch.testing.assert_close(out.loss.detach(), reference.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12)
    out.loss.backward()
    for leaf, gradient in zip(leaves, reference.gradients, strict=True):
        expected = torch.zeros_like(leaf) if gradient is None else gradient
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", rates.KINDS)
def test_learning_rates(kind: str, first_order: bool, form: str, force_form) -> None:
    force_form(form)
    inner_lr = rates.by_kind(kind, 3, shapes(NAMES))
    agree(
        network(), *data(), rates.leaves(inner_lr),
        {"rate": rates.reader(kind, inner_lr), "steps": 3, "first_order": first_order},
        inner_lr=inner_lr, inner_steps=3, first_order=first_order,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("adapt", "names"),
    [
        ("4", HEAD),
        ("4.bias", ("4.bias",)),
        (["0", "2.weight"], ("0.weight", "0.bias", "2.weight")),
        (lambda name, p: p.dim() == 1, ("0.bias", "2.bias", "4.bias")),
    ],
    ids=["head", "one", "body", "predicate"],
)
def test_adapting_a_part(adapt: Any, names: tuple[str, ...], form: str, force_form) -> None:
    force_form(form)
    agree(
        network(), *data(), [],
        {"rate": lambda name, step: 0.3, "steps": 2, "adapted": list(names), "prox": 0.2},
        inner_lr=0.3, inner_steps=2, adapt=adapt, prox=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_leaf", [False, True])
@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.7), (0.0, 0.5, 0.0), (1.0, 0.0, 0.0)], ids=str)
def test_step_weights(weights: Any, as_leaf: bool, form: str, force_form) -> None:
    force_form(form)
    given_weights: Any = weights
    if as_leaf:
        given_weights = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    agree(
        network(), *data(), [given_weights] if as_leaf else [],
        {"rate": lambda name, step: 0.2, "steps": 2, "step_weights": given_weights},
        inner_lr=0.2, inner_steps=2, step_weights=given_weights,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_task_weights(form: str, force_form) -> None:
    force_form(form)
    weights = torch.tensor([0.2, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    agree(
        network(), *data(), [weights],
        {"rate": lambda name, step: 0.2, "steps": 2, "task_weights": weights},
        inner_lr=0.2, inner_steps=2, task_weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_no_inner_steps(form: str, force_form) -> None:
    force_form(form)
    model, (support, query) = network(), data()
    agree(model, support, query, [], {"steps": 0}, inner_steps=0)
    out = fastmeta.maml_step(model, support, query, inner_steps=0)
    assert out.support_losses.shape == (0, 3)


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_outputs_of_every_step(form: str, force_form) -> None:
    force_form(form)
    model, (support, query) = network(), data()
    reference = oracle.maml(model, oracle.split(support, query), list(model.parameters()), steps=3)
    out = fastmeta.maml_step(model, support, query, inner_steps=3)
    expected = torch.stack([torch.stack(losses) for losses in reference.support_losses], dim=1)
    torch.testing.assert_close(out.support_losses, expected, rtol=1e-12, atol=1e-12)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, rtol=1e-12, atol=1e-12)
    for tensor in (out.task_losses, out.support_losses, out.query_outputs):
        assert not tensor.requires_grad


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    form=st.sampled_from(FORMS),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4)),
    kind=st.sampled_from(rates.KINDS),
    head_only=st.booleans(),
    first_order=st.booleans(),
    prox=st.sampled_from([0.0, 0.4]),
    multi_step=st.booleans(),
    weighted=st.booleans(),
    data_leaves=st.booleans(),
)
def test_options_drawn_together(
    force_form, form, sizes, kind, head_only, first_order, prox, multi_step, weighted, data_leaves
) -> None:
    tasks, support_count, query_count, steps = sizes
    force_form(form)
    model, (support, query) = network(), data(tasks, support_count, query_count)
    names = HEAD if head_only else NAMES
    inner_lr = rates.by_kind(kind, steps, shapes(names))
    leaves = rates.leaves(inner_lr)
    step_weights = learned(steps + 1) if multi_step else None
    task_weights = learned(tasks) if weighted else None
    leaves += [leaf for leaf in (step_weights, task_weights) if leaf is not None]
    if data_leaves and form != "fused":  # which declines them
        leaves += [support[0].requires_grad_(), query[0].requires_grad_()]
    agree(
        model, support, query, leaves,
        {
            "rate": rates.reader(kind, inner_lr), "steps": steps, "adapted": list(names),
            "first_order": first_order,
            "step_weights": step_weights, "task_weights": task_weights, "prox": prox,
        },
        inner_lr=inner_lr, inner_steps=steps, adapt="4" if head_only else None,
        first_order=first_order, step_weights=step_weights, task_weights=task_weights, prox=prox,
    )  # fmt: skip


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_the_default_choice_agrees_too(memory: str) -> None:
    agree(
        network(), *data(), [],
        {"rate": lambda name, step: 0.2, "steps": 3},
        inner_lr=0.2, inner_steps=3, memory=memory,
    )  # fmt: skip


def test_default_loss_and_mean_over_tasks() -> None:
    model, (support, query) = network(), data()
    out = fastmeta.maml_step(model, support, query)
    given_loss = fastmeta.maml_step(model, support, query, loss_fn=F.cross_entropy)
    assert torch.equal(out.loss, given_loss.loss)
    torch.testing.assert_close(out.loss.detach(), out.task_losses.mean())
