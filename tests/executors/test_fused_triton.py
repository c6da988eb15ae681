"""The whole step by Triton's kernels, in its interpreter, against the float64 oracle."""

from __future__ import annotations

import dataclasses

import drawn_steps
import oracle
import pytest
import torch
import torch.nn.functional as F
import triton_on_host  # noqa: F401
from drawn_agreement import Corners, apart, compared, filled
from drawn_steps import Case
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from mlps import LOSSES, TAKE_LABELS, examples, mlp
from torch import Tensor, nn

import fastmeta
from fastmeta.plan import planner, trial

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

STEPS = 2
NAME = "fused-triton-on-host"


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    monkeypatch.setenv("FASTMETA_TRITON_ON_HOST", "1")


@pytest.fixture
def no_trial(monkeypatch):
    """The trial beside the loop would take as long again."""
    monkeypatch.setattr(trial, "failure", lambda *_: None)


def agrees(model: nn.Module, support, query, loss_fn=F.cross_entropy, **options) -> None:
    leaves = [p for p in model.parameters() if p.requires_grad]
    reference = oracle.maml(
        model, oracle.split(support, query), leaves,
        rate=lambda name, step: 0.2, steps=STEPS, loss_fn=loss_fn, **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, support, query,
        inner_lr=0.2, inner_steps=STEPS, loss_fn=loss_fn, executor="fused", **options,
    )  # fmt: skip
    assert out.executor == NAME
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12)
    expected = torch.stack([torch.stack(losses) for losses in reference.support_losses], dim=1)
    torch.testing.assert_close(out.support_losses, expected, rtol=1e-12, atol=1e-12)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, no_trial) -> None:
    model = mlp(3, 5, 4, activation=nn.Tanh())
    labels = loss in TAKE_LABELS
    data = [examples(1, count, model, labels) for count in (4, 3)]
    if loss == "ignore_index":
        for _, y in data:
            y[:, 0], y[:, 1] = 1, 2  # at least one ignored, at least one not
    agrees(model, *data, LOSSES[loss])


def test_layers_wider_than_a_tile_and_an_activation_at_the_end(no_trial) -> None:
    model = mlp(35, 40, 33, activation=nn.SiLU()).append(nn.Softplus())
    data = [examples(1, count, model[:-1], False) for count in (34, 3)]
    agrees(model, *data, F.mse_loss)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_batch_norm(statistics: str, no_trial) -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(5)
    norm.running_mean, norm.running_var = torch.randn(5), 0.5 + torch.rand(5)
    norm.num_batches_tracked += 1
    model = nn.Sequential(nn.Linear(3, 5), norm, nn.GELU(), nn.Linear(5, 2)).double()
    model.train(statistics == "batch")
    data = [examples(1, count, model, True) for count in (4, 3)]
    agrees(model, *data)


@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {"prox": 0.4},
        {"step_weights": torch.tensor([0.5, 0.0, 1.0]).double()},
        {"task_weights": torch.tensor([0.3, -0.7]).double()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options: dict, no_trial) -> None:
    model = mlp(3, 4, 2, activation=nn.Tanh())
    agrees(model, *(examples(2, count, model, True) for count in (3, 4)), **options)


def small(case: Case) -> Case:
    """What the interpreter gets through in a second or two."""
    return dataclasses.replace(
        case, widths=case.widths[:3], tasks=min(case.tasks, 2), steps=min(case.steps, 2)
    )


@settings(
    max_examples=25, derandomize=True, deadline=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(case=drawn_steps.cases.map(small), differentiate=st.sampled_from([True, True, True, False]))
def test_drawn_steps(case: Case, differentiate: bool, no_trial) -> None:
    corners = Corners()
    drawn = drawn_steps.draw(case)
    watched = drawn.to(torch.float64)
    corners.watch(watched.model)
    reference = watched.reference(corners.watched(case))
    assume(corners.nearest > 1e-11)
    expected = compared(watched, reference, filled(reference.gradients, watched.leaves()))
    with torch.set_grad_enabled(differentiate):
        out = fastmeta.maml_step(
            drawn.model, drawn.support, drawn.query, executor="fused", **drawn.options()
        )
    assert out.executor == NAME
    if differentiate:
        leaves = drawn.leaves()
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        got = compared(drawn, out, filled(list(gradients), leaves))
    else:
        got = compared(drawn, out, [])
        expected = {**expected, "parameters": torch.zeros(0), "rates and weights": torch.zeros(0)}
    found = apart(got, expected)
    note(f"apart by {found}")
    assert max(found.values()) <= 1e-10


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_parameters(steps: int, no_trial) -> None:
    model = mlp(3, 4, 2, activation=nn.Tanh())
    x, y = examples(2, 5, model, True)
    adapted = fastmeta.adapt(
        model, (x, y), inner_lr=0.2, inner_steps=steps, adapt="2", executor="fused"
    )
    for i in range(2):
        weight = {name: p.detach() for name, p in model.named_parameters()}
        for _ in range(steps):
            moving = {name: p.requires_grad_() for name, p in weight.items() if name[0] == "2"}
            loss = F.cross_entropy(torch.func.functional_call(model, {**weight}, (x[i],)), y[i])
            gradients = torch.autograd.grad(loss, list(moving.values()))
            for (name, p), g in zip(moving.items(), gradients, strict=True):
                weight[name] = (p - 0.2 * g).detach()
        for name, value in adapted.parameters.items():
            torch.testing.assert_close(value[i], weight[name].detach(), rtol=1e-12, atol=1e-12)


def test_the_trial_beside_the_loop_passes_and_float32_is_as_close_as_rounding_allows() -> None:
    model = mlp(3, 8, 4, activation=nn.Tanh())
    data = [examples(2, count, model, True) for count in (5, 4)]
    exact = oracle.maml(
        model, oracle.split(*data), list(model.parameters()), rate=lambda name, step: 0.1, steps=2
    )
    single = model.float()
    narrow = [(x.float(), y) for x, y in data]
    out = fastmeta.maml_step(single, *narrow, inner_lr=0.1, inner_steps=2)
    assert out.executor == NAME
    # Sums of at most 8 terms, 2 layers, 2 steps forward and back.
    tolerance = 2 * 2 * 2 * 8**0.5 * torch.finfo(torch.float32).eps
    for got, expected in zip(
        torch.autograd.grad(out.loss, list(single.parameters())), exact.gradients, strict=True
    ):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_a_label_that_is_no_class_costs_its_own_task_alone(no_trial, monkeypatch) -> None:
    monkeypatch.setattr(planner, "_check_targets", lambda *_: None)  # as on a GPU
    model = mlp(3, 4, 2, activation=nn.Tanh())
    data = [examples(2, count, model, True) for count in (3, 4)]
    data[1][1][0, 1] = 7
    losses = fastmeta.maml_step(model, *data, inner_steps=1, executor="fused").task_losses
    assert losses.isnan().tolist() == [True, False]


def test_the_same_bits_every_time(no_trial) -> None:
    model = mlp(3, 4, 2, activation=nn.Tanh())
    data = [examples(2, count, model, True) for count in (3, 4)]
    found: list[Tensor] = []
    for _ in range(2):
        out = fastmeta.maml_step(model, *data, inner_steps=1, executor="fused")
        found.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(out.loss, list(model.parameters()))]
            )
        )
    assert torch.equal(*found)
