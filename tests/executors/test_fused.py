"""The fused step against the float64 oracle: networks, losses, sizes, instruction sets, threads."""

from __future__ import annotations

import os
import re
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from mlps import ACTIVATIONS, LOSSES, TAKE_LABELS, examples, mlp
from torch import Tensor, nn

import fastmeta
from fastmeta.executors.extension import extension

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, FUSED, KERNELS, cpu_only


@pytest.fixture(params=ANCHORED)
def instruction_set(request, monkeypatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


def agrees(
    model: nn.Module, support: Any, query: Any, loss_fn: Any, steps: int = 3, **options: Any
) -> None:
    """In float64 to 1e-10 of the oracle; in float32 to the rounding of as many steps."""
    leaves = list(model.parameters())
    reference = oracle.maml(
        model, oracle.split(support, query), leaves,
        rate=lambda name, step: 0.2, steps=steps, loss_fn=loss_fn, **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, support, query,
        inner_lr=0.2, inner_steps=steps, loss_fn=loss_fn, executor="fused", **options,
    )  # fmt: skip
    assert out.executor == FUSED
    torch.testing.assert_close(out.loss.detach(), reference.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-12, atol=1e-12)
    expected = torch.stack([torch.stack(losses) for losses in reference.support_losses], dim=1)
    torch.testing.assert_close(out.support_losses, expected, rtol=1e-12, atol=1e-12)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, loss: str, instruction_set: str) -> None:
    model = mlp(3, 7, 6, 4, activation=ACTIVATIONS[activation])
    labels = loss == "cross_entropy"
    data = examples(5, 4, model, labels), examples(5, 6, model, labels)
    agrees(model, *data, LOSSES[loss])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, instruction_set: str) -> None:
    model = mlp(3, 7, 4, activation=nn.Tanh())
    labels = loss in TAKE_LABELS
    data = [examples(5, count, model, labels) for count in (4, 6)]
    if loss == "ignore_index":
        for _, y in data:
            y[:, 0], y[:, 1] = 1, 2  # at least one ignored, at least one not
    agrees(model, *data, LOSSES[loss])


@pytest.mark.parametrize("tasks", [1, 3, 17, 33])
@pytest.mark.parametrize("width", [1, 5, 7, 40])
def test_odd_sizes(tasks: int, width: int, instruction_set: str) -> None:
    model = mlp(width, width, width, 2, activation=nn.Tanh())
    agrees(
        model, examples(tasks, 3, model, True), examples(tasks, 11, model, True), F.cross_entropy
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(3, 2), (3, 6, 2), (1, 11, 13, 6, 1)], ids=str)
def test_depths(widths: tuple[int, ...], bias: bool, instruction_set: str) -> None:
    model = mlp(*widths, activation=nn.ELU(), bias=bias)
    agrees(model, examples(3, 5, model, False), examples(3, 7, model, False), F.mse_loss)


def test_an_activation_at_the_end_and_a_flatten_in_front(instruction_set: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Tanh()).double()
    data = [(torch.randn(3, n, 2, 3).double(), torch.rand(3, n, 3).double()) for n in (4, 5)]
    agrees(model, *data, F.mse_loss, prox=0.3, first_order=False)


def test_float32_is_as_close_as_its_rounding_allows(instruction_set: str) -> None:
    model = mlp(3, 40, 40, 4, activation=nn.Tanh())
    data = [examples(20, n, model, True) for n in (5, 15)]
    exact = oracle.maml(
        model, oracle.split(*data), list(model.parameters()),
        rate=lambda name, step: 0.1, steps=5,
    )  # fmt: skip
    single = model.float()
    narrow = [(x.float(), y) for x, y in data]
    out = fastmeta.maml_step(single, *narrow, inner_lr=0.1, inner_steps=5, executor="fused")
    gradients = torch.autograd.grad(out.loss, list(single.parameters()))
    # Sums of at most 40 terms, 3 layers, 5 steps forward and back.
    tolerance = 3 * 2 * 5 * 40**0.5 * torch.finfo(torch.float32).eps
    for got, wanted in zip(gradients, exact.gradients, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(
    activation: str, dtype: torch.dtype, instruction_set: str
) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), ACTIVATIONS[activation]).to(dtype)
    nn.init.ones_(model[0].weight)
    size = torch.logspace(-12, 3, 301, dtype=torch.float64)
    x = torch.cat([-size, size, torch.tensor([0.0, float("nan"), 1e6, -1e6])]).view(1, -1, 1)
    x = x.to(dtype)
    with torch.no_grad():
        out = fastmeta.maml_step(
            model, (x, x), (x, x), inner_steps=0, loss_fn=F.mse_loss, executor="fused"
        )
        expected = ACTIVATIONS[activation](x.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.query_outputs.double(), expected, rtol=8 * eps, atol=4 * eps, equal_nan=True
    )


@pytest.mark.parametrize("tasks", [33, 100])
def test_the_number_of_threads_changes_no_bit(tasks: int, instruction_set: str) -> None:
    model = mlp(3, 9, 4, activation=nn.ReLU())
    data = [examples(tasks, n, model, True) for n in (5, 6)]
    results: list[list[Tensor]] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            out = fastmeta.maml_step(model, *data, inner_steps=2, executor="fused")
        finally:
            torch.set_num_threads(1)
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    model = mlp(3, 5, 2, activation=nn.ReLU())
    data = [examples(100, n, model, True) for n in (5, 6)]
    torch.set_num_threads(2)
    try:
        here = fastmeta.maml_step(model, *data, executor="fused").loss
        child = os.fork()
        if child == 0:
            there = fastmeta.maml_step(model, *data, executor="fused").loss
            os._exit(0 if torch.equal(here, there) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)), {}, "GroupNorm"),
        (nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(-0.1)), {}, "negative slope"),
        (nn.Sequential(nn.Linear(3, 2)).bfloat16(), {}, "torch.bfloat16"),
    ],
    ids=["group-norm", "slope", "bfloat16"],
)
def test_what_it_declines_it_names(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    dtype = next(model.parameters()).dtype
    data = [(torch.randn(2, 4, 3, dtype=dtype), torch.randint(2, (2, 4))) for _ in range(2)]
    with pytest.raises(ValueError, match=f"executor: 'fused' can't serve: .*{re.escape(reason)}"):
        fastmeta.maml_step(model, *data, executor="fused", **options)
    assert "fused" not in fastmeta.maml_step(model, *data, **options).executor


def test_targets_that_require_grad_are_left_to_the_general_path() -> None:
    model = nn.Linear(3, 2)
    support, query = [(torch.randn(2, 4, 3), torch.randn(2, 4, 2)) for _ in range(2)]
    support[1].requires_grad_()
    out = fastmeta.maml_step(model, support, query, loss_fn=F.mse_loss)
    out.loss.backward()
    assert out.executor == "generic"
    assert support[1].grad is not None


def test_ragged_tasks_and_adapt_are_served(force_form) -> None:
    force_form("fused")
    model = mlp(3, 6, 2, activation=nn.Tanh())
    pairs = [
        [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in counts]
        for counts in ((2, 4, 3), (5, 1, 2))
    ]
    reference = oracle.maml(
        model,
        [(*s, *q) for s, q in zip(*pairs, strict=True)],
        list(model.parameters()),
        rate=lambda name, step: 0.2, steps=2,
    )  # fmt: skip
    out = fastmeta.maml_step(model, *pairs, inner_lr=0.2, inner_steps=2)
    assert out.executor == FUSED
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    for a, b in zip(got, reference.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    adapted = fastmeta.adapt(model, pairs[0], inner_lr=0.2, inner_steps=2)
    for i, (x, _) in enumerate(pairs[1]):
        torch.testing.assert_close(
            adapted[i](x).detach(), reference.query_outputs[i].detach(), rtol=1e-12, atol=1e-12
        )


@cpu_only
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_ISA", "abacus")
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    with pytest.raises(ValueError, match="FASTMETA_ISA: 'abacus'"):
        fastmeta.maml_step(nn.Linear(3, 2), *data, executor="fused")


@cpu_only
@pytest.mark.usefixtures("instruction_set")
def test_the_kernel_that_is_forced_runs(monkeypatch) -> None:
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    text = fastmeta.explain(nn.Linear(3, 2), *data, executor="fused")
    forced = os.environ["FASTMETA_ISA"]
    assert f"kernel: {forced}, lanes over {os.environ['FASTMETA_ENGINE']}" in text
    monkeypatch.setenv("FASTMETA_ISA", "")
    best = extension().instruction_sets()[0]
    text = fastmeta.explain(nn.Linear(3, 2), *data, executor="fused")
    assert f"kernel: {best}, " in text


def test_a_gradient_of_nothing_but_rounding_is_no_disagreement() -> None:
    """Far from two targets, huber's derivatives are alike, and batch norm takes their mean away."""
    loss_fn = nn.HuberLoss(delta=0.1)
    for _ in range(20):
        linear, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=0.125, affine=False)
        model = nn.Sequential(linear, nn.Identity(), norm).double()
        data = [(torch.randn(1, 2, 1).double(), 3 + torch.rand(1, 2, 1).double()) for _ in "sq"]
        out = fastmeta.maml_step(model, *data, inner_steps=0, loss_fn=loss_fn, executor="fused")
        assert out.executor == FUSED


def test_it_is_taken_unasked() -> None:
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    assert fastmeta.maml_step(nn.Linear(3, 2), *data).executor == FUSED


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_rates_in_a_tensor_need_not_be_learned(shape: tuple[int, ...]) -> None:
    model = mlp(3, 6, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    found = []
    for inner_lr in (0.2, torch.full(shape, 0.2, dtype=torch.float64)):
        out = fastmeta.maml_step(model, *data, inner_lr=inner_lr, inner_steps=2, executor="fused")
        found.append(torch.autograd.grad(out.loss, list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_another_learning_rate_is_heeded(memory: str) -> None:
    """The number is no part of what is found once for a model."""
    model = mlp(3, 8, 2, activation=nn.Tanh())
    support, query = examples(4, 5, model, True), examples(4, 6, model, True)
    losses: dict[str, list[float]] = {}
    for executor in ("fused", "generic"):
        losses[executor] = [
            float(
                fastmeta.maml_step(
                    model, support, query, inner_lr=rate, memory=memory, executor=executor
                ).task_losses.sum()
            )
            for rate in (0.01, 0.1, 1.0, 0.01)
        ]
    assert len(set(losses["fused"])) == 3
    assert losses["fused"] == pytest.approx(losses["generic"], rel=1e-12)
    few, more = (fastmeta.adapt(model, support, inner_lr=rate) for rate in (0.01, 1.0))
    assert not torch.equal(few.parameters["0.weight"], more.parameters["0.weight"])


def test_numbers_by_name_keep_their_digits() -> None:
    model = mlp(3, 8, 2, activation=nn.Tanh())
    data = examples(4, 5, model, True), examples(4, 6, model, True)
    by_name = {name: 0.1 for name, _ in model.named_parameters()}
    one, each = (fastmeta.maml_step(model, *data, inner_lr=rate) for rate in (0.1, by_name))
    torch.testing.assert_close(each.loss, one.loss, rtol=1e-14, atol=0)
