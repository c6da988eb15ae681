"""Batch norm in the fused step against the float64 oracle."""

from __future__ import annotations

import copy
import itertools
import os
import re
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
from fastmeta.demo.networks import not_batch_norm, omniglot_mlp

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, FUSED, KERNELS, cpu_only

ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "gelu": nn.GELU(),
}
MODES = ("batch", "tracked", "running")
"""Statistics of the batch, of the batch with running ones kept, or the running ones."""


@pytest.fixture(params=ANCHORED)
def instruction_set(request, monkeypatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


def norm(width: int, mode: str, affine: bool = True, eps: float = 1e-5) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(width, eps, affine=affine, track_running_stats=mode != "batch").double()
    if affine:
        nn.init.uniform_(made.weight, 0.5, 1.5)
        nn.init.uniform_(made.bias, -0.5, 0.5)
    if mode == "running":
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2.0)
        made.num_batches_tracked.fill_(3)
        made.eval()
    return made


def network(
    *widths: int, mode: str = "batch", activation: str = "tanh", bias: bool = True, **options: Any
) -> nn.Sequential:
    """A chain with a norm in every layer but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        layers += [norm(outputs, mode, **options), ACTIVATIONS[activation]]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:])).double()


def examples(tasks: int, count: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, count, inputs).double(), torch.randint(classes, (tasks, count))


def error(ours: Any, exact: Any) -> float:
    """Relative to the whole gradient."""
    left, right = (
        torch.cat([(torch.zeros(1) if g is None else g).flatten().double() for g in gradients])
        for gradients in (ours, exact)
    )
    return float((left - right).norm() / right.norm())


def agrees(
    model: nn.Module,
    support: Any,
    query: Any,
    oracle_options: dict[str, Any],
    threads: int = 1,
    **options: Any,
) -> None:
    """Losses to 1e-11, the whole gradient to 1e-9, and buffers stay as they were."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    leaves += oracle_options.pop("leaves", [])
    buffers = copy.deepcopy(list(model.buffers()))
    reference = oracle.maml(model, oracle.split(support, query), leaves, **oracle_options)
    torch.set_num_threads(threads)
    try:
        out = fastmeta.maml_step(model, support, query, executor="fused", **options)
    finally:
        torch.set_num_threads(1)
    assert out.executor == FUSED
    torch.testing.assert_close(out.task_losses, reference.task_losses, rtol=1e-11, atol=1e-11)
    outputs = torch.stack(reference.query_outputs).detach()
    torch.testing.assert_close(out.query_outputs, outputs, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    assert error(
        [z if g is None else g for g, z in zip(gradients, zeros, strict=True)],
        [z if g is None else g for g, z in zip(reference.gradients, zeros, strict=True)],
    ) < 1e-9  # fmt: skip
    assert all(map(torch.equal, model.buffers(), buffers))


def plain(steps: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """The oracle's options, and the same for the step."""
    return (
        {"rate": lambda name, step: 0.2, "steps": steps},
        {"inner_lr": 0.2, "inner_steps": steps},
    )


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinds(activation: str, mode: str, affine: bool, instruction_set: str) -> None:
    model = network(3, 7, 6, 4, mode=mode, activation=activation, affine=affine)
    ours, theirs = plain()
    agrees(model, examples(5, 4, 3, 4), examples(5, 6, 3, 4), ours, **theirs)


@pytest.mark.parametrize("tasks", [1, 3, 17, 33])
@pytest.mark.parametrize("counts", [(2, 9), (5, 15), (11, 3)], ids=str)
def test_odd_sizes(tasks: int, counts: tuple[int, int], instruction_set: str) -> None:
    model = network(5, 11, 1, 2)
    ours, theirs = plain(2)
    agrees(model, *(examples(tasks, n, 5, 2) for n in counts), ours, **theirs)


@pytest.mark.parametrize("mode", MODES)
def test_at_the_output(mode: str, instruction_set: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), norm(4, mode)).double()
    ours, theirs = plain()
    agrees(model, examples(5, 4, 3, 4), examples(5, 6, 3, 4), ours, **theirs)


def test_by_function(instruction_set: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.scale, self.shift = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            h = F.batch_norm(
                self.first(x), None, None, self.scale, self.shift, training=True, eps=1e-3
            )
            return self.last(F.silu(h))

    ours, theirs = plain()
    agrees(Functional().double(), examples(3, 4, 3, 2), examples(3, 6, 3, 2), ours, **theirs)


def drawn_rates(kind: str, model: nn.Module, names: list[str], steps: int) -> Any:
    """`(inner_lr, the oracle's rate function, leaves)`."""

    def learned(*shape: int) -> Tensor:
        return (0.1 + 0.1 * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    if kind == "number":
        return 0.2, lambda name, step: 0.2, []
    if kind == "per-step":
        rate = learned(steps)
        return rate, lambda name, step: rate[step], [rate]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    make = {
        "layer": lambda shape: learned(),
        "element": lambda shape: learned(*shape),
        "layer-step": lambda shape: learned(steps, *(1,) * len(shape)),
        "element-step": lambda shape: learned(steps, *shape),
    }[kind]
    rates = {name: make(shapes[name]) for name in names}
    at = (lambda name, step: rates[name][step]) if kind.endswith("step") else None
    return rates, at or (lambda name, step: rates[name]), list(rates.values())


RATE_KINDS = ("number", "per-step", "layer", "element", "layer-step", "element-step")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    instruction_set=st.sampled_from(list(KERNELS)),
    threads=st.sampled_from([1, 2]),
    sizes=st.tuples(st.integers(1, 20), st.integers(2, 6), st.integers(2, 6), st.integers(0, 4)),
    mode=st.sampled_from(MODES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    frozen=st.sets(st.sampled_from(["0.bias", "1.weight", "1.bias", "3.weight", "4.weight"])),
    moved=st.sets(st.integers(0, 9), min_size=1),
    kind=st.sampled_from(RATE_KINDS),
    first_order=st.booleans(),
    prox=st.sampled_from([0.0, 0.4]),
    multi_step=st.booleans(),
)
def test_options_drawn_together(
    instruction_set, threads, sizes, mode, activation, bias, affine, eps, frozen, moved, kind,
    first_order, prox, multi_step,
) -> None:  # fmt: skip
    tasks, support, query, steps = sizes
    model = network(3, 5, 4, 2, mode=mode, activation=activation, bias=bias, affine=affine, eps=eps)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = sorted({trainable[i % len(trainable)] for i in moved})
    inner_lr, rate, leaves = drawn_rates(kind, model, adapted, steps)
    step_weights = None
    if multi_step:
        step_weights = torch.rand(steps + 1, dtype=torch.float64).requires_grad_()
        leaves = [*leaves, step_weights]
    common = {"first_order": first_order, "prox": prox, "step_weights": step_weights}
    with mock.patch.dict(os.environ, KERNELS[instruction_set]):
        agrees(
            model, examples(tasks, support, 3, 2), examples(tasks, query, 3, 2),
            {"rate": rate, "steps": steps, "adapted": adapted, "leaves": leaves, **common},
            threads, inner_lr=inner_lr, inner_steps=steps, adapt=adapted, **common,
        )  # fmt: skip


@pytest.mark.parametrize("kind", RATE_KINDS)
@pytest.mark.parametrize("adapt", [None, not_batch_norm], ids=["all", "not-norms"])
def test_omniglot_mlp(adapt: Any, kind: str) -> None:
    model = omniglot_mlp(5).double()
    for p in model.parameters():  # MAML's own start is near symmetric: little would be seen
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    names = [
        name for name, p in model.named_parameters()
        if p.requires_grad and (adapt is None or adapt(name, p))
    ]  # fmt: skip
    inner_lr, rate, leaves = drawn_rates(kind, model, names, 2)
    data = [(torch.rand(3, n, 1, 28, 28).double(), torch.randint(5, (3, n))) for n in (5, 10)]
    agrees(
        model, *data, {"rate": rate, "steps": 2, "adapted": names, "leaves": leaves},
        inner_lr=inner_lr, inner_steps=2, adapt=adapt,
    )  # fmt: skip


def test_float32_is_as_close_as_its_rounding_allows(instruction_set: str) -> None:
    model = network(3, 40, 40, 4)
    data = [examples(20, n, 3, 4) for n in (10, 15)]
    leaves = list(model.parameters())
    exact = oracle.maml(model, oracle.split(*data), leaves, rate=lambda name, step: 0.1, steps=5)
    single = copy.deepcopy(model).float()
    narrow = [(x.float(), y) for x, y in data]
    out = fastmeta.maml_step(single, *narrow, inner_lr=0.1, inner_steps=5, executor="fused")
    gradients = torch.autograd.grad(out.loss, list(single.parameters()))
    # Sums of at most 40 terms; products and norms of 3 layers, 5 steps forward and back. What comes
    # out of a norm is as much greater in error as its input's spread is smaller than 1.
    spread = min(float(h.std(1, unbiased=False).min()) for h in hidden(model, data[0][0]))
    tolerance = 5 * 2 * 5 * 40**0.5 / spread * torch.finfo(torch.float32).eps
    assert error(gradients, exact.gradients) <= tolerance


def hidden(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What enters each norm, task by task."""
    found: list[Tensor] = []
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.BatchNorm1d):
                found.append(x)
                x = torch.stack([layer(task) for task in x])
            else:
                x = layer(x)
    return found


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(instruction_set: str) -> None:
    """The sum of squares would: float32 has no digit left of 1 beside 1e8."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    nn.init.ones_(model[0].weight)
    x = 1e4 + torch.tensor([-1.5, -0.5, 0.5, 1.5]).view(1, 4, 1)
    out = fastmeta.maml_step(
        model, (x, x), (x, x), inner_steps=0, loss_fn=F.mse_loss, executor="fused"
    )
    expected = model.double()(x[0].double())
    torch.testing.assert_close(out.query_outputs[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tasks", [33, 100])
def test_the_number_of_threads_changes_no_bit(tasks: int, instruction_set: str) -> None:
    model = network(3, 9, 4, activation="relu")
    data = [examples(tasks, n, 3, 4) for n in (5, 6)]
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


@pytest.mark.parametrize("mode", MODES)
def test_adapt(mode: str, force_form) -> None:
    model = network(3, 6, 2, mode=mode)
    support, (x, _) = examples(3, 4, 3, 2), examples(3, 5, 3, 2)
    force_form("loop")
    expected = fastmeta.adapt(model, support, inner_lr=0.2, inner_steps=3)
    force_form("fused")
    adapted = fastmeta.adapt(model, support, inner_lr=0.2, inner_steps=3)
    for name, tensor in expected.parameters.items():
        torch.testing.assert_close(adapted.parameters[name], tensor, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapted(x), expected(x), rtol=1e-10, atol=1e-12)


def test_ragged_tasks_are_grouped_by_size(force_form) -> None:
    force_form("fused")
    model = network(3, 6, 2)
    pairs = [
        [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in counts]
        for counts in ((2, 4, 2, 3), (5, 3, 5, 2))
    ]
    tasks = [(*s, *q) for s, q in zip(*pairs, strict=True)]
    leaves = list(model.parameters())
    reference = oracle.maml(model, tasks, leaves, rate=lambda name, step: 0.2, steps=2)
    out = fastmeta.maml_step(model, *pairs, inner_lr=0.2, inner_steps=2)
    assert out.executor == FUSED
    assert error(torch.autograd.grad(out.loss, leaves), reference.gradients) < 1e-9


@pytest.mark.parametrize("counts", [(1, 4), (4, 1)], ids=["support", "query"])
def test_one_example_is_what_torch_refuses(counts: tuple[int, int]) -> None:
    model = network(3, 6, 2)
    fastmeta.maml_step(model, examples(2, 4, 3, 2), examples(2, 4, 3, 2), executor="fused")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as torchs:
        model(torch.randn(1, 3).double())
    with pytest.raises(ValueError, match=re.escape(str(torchs.value))):
        fastmeta.maml_step(model, *(examples(2, n, 3, 2) for n in counts), executor="fused")


class Recorded(nn.Module):
    """Writes a buffer beside its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.BatchNorm1d(3), nn.Linear(3, 2)),
        (nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        (nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)),
    ],
    ids=["first", "after-activation", "twice"],
)
@cpu_only
def test_a_norm_stands_anywhere(layers: tuple[nn.Module, ...]) -> None:
    model = nn.Sequential(*layers).double()
    data = examples(3, 5, 3, 2), examples(3, 5, 3, 2)
    found: list[Tensor] = []
    for executor in ("fused", "generic"):
        out = fastmeta.maml_step(model, *data, inner_steps=2, inner_lr=0.3, executor=executor)
        gradients = torch.autograd.grad(out.loss, [*model.parameters()])
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-11


def test_what_it_declines_it_names() -> None:
    data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in range(2)]
    with pytest.raises(ValueError, match=r"fused' can't serve: .*adds values of different shapes"):
        fastmeta.maml_step(Recorded(), *data, executor="fused")
    assert "fused" not in fastmeta.maml_step(Recorded(), *data).executor
