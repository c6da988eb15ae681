"""Losses and update rules that torch computes, with the network's passes compiled.

Losses that could be traced are not here, so that torch computes them too (`test_expressions.py`).

Held against the general path, whose derivatives are autograd's through the whole loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import drawn_steps
import pytest
import torch
import torch.nn.functional as F
from drawn_steps import Case
from fused_kernels import cpu_only
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from mlps import mlp
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastmeta
from fastmeta.inner import SGD, Adam, InnerOptimizer
from fastmeta.network.expressions.tracing import Untraceable

Losses = Callable[[Any, Any], Tensor]


class Judge(nn.Module):
    """A loss with a network of its own, in float64."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2 * outputs, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.network(torch.cat([prediction, target], -1)).square().mean()


@pytest.fixture(autouse=True)
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss is an expression."""

    def refuse(*_: object) -> None:
        raise Untraceable("the test says so")

    monkeypatch.setattr("fastmeta.plan.planner.trace", refuse)


def captured(outputs: int) -> tuple[Losses, list[Tensor]]:
    log_std = torch.linspace(-0.5, 0.5, outputs).double().requires_grad_()

    def gaussian(mean: Tensor, action: Tensor) -> Tensor:
        z = (action - mean) * torch.exp(-log_std)
        return (0.5 * z.square() + log_std).sum(-1).mean()

    return gaussian, [log_std]


def judged(outputs: int) -> tuple[Losses, list[Tensor]]:
    judge = Judge(outputs)
    return judge, [*judge.parameters()]


def mixing(outputs: int) -> tuple[Losses, list[Tensor]]:
    def contrast(prediction: Tensor, target: Tensor) -> Tensor:
        alike = prediction @ target.T  # [N, N]
        return torch.logsumexp(alike, 1).mean() + prediction.mean(0).square().sum()

    return contrast, []


def branching(outputs: int) -> tuple[Losses, list[Tensor]]:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.mean() > target.mean():
            return (prediction - target).square().mean()
        return (prediction - target).cosh().mean()

    return loss, []


def tree(outputs: int) -> tuple[Losses, list[Tensor]]:
    def loss(prediction: Tensor, target: Any) -> Tensor:
        error = (prediction - target["y"][0]).square().sum(-1)
        return (error * target["advantage"]).mean()

    return loss, []


def linear(outputs: int) -> tuple[Losses, list[Tensor]]:
    """Without a Hessian of its own."""
    return (lambda prediction, target: -(prediction * target).sum(-1).mean()), []


LOSSES = {
    "captured": captured, "judged": judged, "mixing": mixing, "branching": branching, "tree": tree,
    "linear": linear,
}  # fmt: skip
QUERY_LOSSES = ("same", "mse", "captured", "judged")


class Scaled(InnerOptimizer, nn.Module):
    """A learned rule: gradients and a memory of them through a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def init(self, parameters: Any) -> Any:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}

    def update(self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int) -> Any:
        state = {name: 0.5 * state[name] + g for name, g in gradients.items()}
        moved = {
            name: p
            - rates[name] * self.network(torch.stack([gradients[name], state[name]], -1))[..., 0]
            for name, p in parameters.items()
        }
        return moved, state


class Signed(InnerOptimizer):
    """No module; a tensor of its own that is learned."""

    def __init__(self) -> None:
        self.sharpness = torch.tensor(2.0).double().requires_grad_()

    def update(self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int) -> Any:
        return {
            name: p - rates[name] * torch.tanh(self.sharpness * gradients[name]) / (1 + step)
            for name, p in parameters.items()
        }, state


class Selective(InnerOptimizer):
    """Leaves every bias as it is, and returns its state unchanged."""

    def init(self, parameters: Any) -> Any:
        return dict(parameters)

    def update(self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int) -> Any:
        return {
            name: p if name.endswith("bias") else p - rates[name] * (gradients[name] + state[name])
            for name, p in parameters.items()
        }, state


OPTIMIZERS: dict[str, Callable[[], InnerOptimizer | None]] = {
    "none": lambda: None,
    "scaled": Scaled,
    "signed": Signed,
    "momentum": lambda: SGD(0.9, weight_decay=0.1),
    "adam": lambda: Adam(eps_root=1e-3),
}


def step_gradients(
    drawn: drawn_steps.Drawn, leaves: list[Tensor], executor: str, **options: Any
) -> tuple[Any, list[Tensor]]:
    out = fastmeta.maml_step(
        drawn.model, drawn.support, drawn.query, executor=executor, **{**drawn.options(), **options}
    )
    found = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    return out, [
        torch.zeros_like(leaf) if part is None else part
        for leaf, part in zip(leaves, found, strict=True)
    ]


def treed(pair: Any) -> Any:
    """Targets as a tree."""
    if isinstance(pair, list):
        return [treed(one) for one in pair]
    x, y = pair
    return x, {"y": (y,), "advantage": y.sum(-1) + 0.1}


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.generate],
)
@given(
    case=drawn_steps.cases,
    loss=st.sampled_from([*LOSSES]),
    query_loss=st.sampled_from(QUERY_LOSSES),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    low=st.booleans(),
    few=st.booleans(),
)
def test_drawn_steps_agree_with_the_general_path(
    case: Case, loss: str, query_loss: str, optimizer: str, low: bool, few: bool, monkeypatch,
) -> None:  # fmt: skip
    if few:  # one vector of tasks at a time
        monkeypatch.setattr("fastmeta.executors.fused.open._STORAGE", 1)
    case = replace(case, loss="mse", probabilities=False)
    drawn = drawn_steps.draw(case)
    outputs = case.widths[-1]
    loss_fn, leaves = LOSSES[loss](outputs)
    leaves = drawn.leaves() + leaves
    query_fn: Any = None
    if query_loss != "same" and loss != "tree":
        query_fn, more = (F.mse_loss, []) if query_loss == "mse" else LOSSES[query_loss](outputs)
        leaves += more
    if loss == "tree":
        drawn.support, drawn.query = treed(drawn.support), treed(drawn.query)
    rule = OPTIMIZERS[optimizer]()
    leaves += [] if rule is None else [*rule.leaves().values()]
    options = {
        "loss_fn": loss_fn, "query_loss_fn": query_fn, "inner_optimizer": rule,
        "memory": "low" if low else "auto",
    }  # fmt: skip
    expected, theirs = step_gradients(drawn, leaves, "generic", **options)
    out, ours = step_gradients(drawn, leaves, "fused", **options)
    assert out.executor == "fused-cpu-open"
    torch.testing.assert_close(out.task_losses, expected.task_losses)
    torch.testing.assert_close(out.support_losses, expected.support_losses)
    pytree.tree_map(torch.testing.assert_close, out.query_outputs, expected.query_outputs)
    apart = 0.0
    for a, b in zip(ours, theirs, strict=True):
        apart = max(apart, float((a - b).norm() / b.norm().clamp(min=1e-2)))
    note(f"gradients apart by {apart:.3g}")
    assert apart < 1e-9


def problem(tasks: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Any]:
    model = mlp(3, 8, 7, 2, activation=nn.Tanh()).to(dtype)

    def sets(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, count, 3).to(dtype), torch.randn(tasks, count, 2).to(dtype)

    return model, sets(5), sets(6)


def gradients_of(model: nn.Module, out: Any) -> Tensor:
    found = torch.autograd.grad(out.loss, [*model.parameters()])
    return torch.cat([part.flatten().double() for part in found])


@pytest.mark.parametrize("executor", ["fused", "layered"])
def test_a_rule_may_return_parameters_as_they_are(executor):
    model, support, query = problem(5)
    options: dict[str, Any] = {
        "loss_fn": F.mse_loss, "inner_lr": 0.1, "inner_steps": 3, "inner_optimizer": Selective(),
    }  # fmt: skip
    ours, expected = (
        gradients_of(model, fastmeta.maml_step(model, support, query, executor=each, **options))
        for each in (executor, "generic")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["tasks", "features"])
@pytest.mark.parametrize("tasks", [1, 5, 17])
@pytest.mark.parametrize("adapt", [None, "4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_engines(engine, tasks, adapt, dtype, monkeypatch):
    monkeypatch.setenv("FASTMETA_ENGINE", engine)
    model, support, query = problem(tasks, dtype)
    options: dict[str, Any] = {
        "loss_fn": mixing(2)[0], "inner_lr": 0.1, "inner_steps": 3, "adapt": adapt,
    }  # fmt: skip
    twin = copy.deepcopy(model)
    ours = gradients_of(
        model, fastmeta.maml_step(model, support, query, executor="fused", **options)
    )
    theirs = gradients_of(
        twin, fastmeta.maml_step(twin, support, query, executor="generic", **options)
    )
    error = (ours - theirs).norm() / theirs.norm()
    assert error < 1e3 * torch.finfo(dtype).eps


def test_support_sets_of_each_step():
    model, (x, y), query = problem(5)
    support = (torch.stack([x, x + 1, x.flip(1)], 1), torch.stack([y, y.flip(0), 2 * y], 1))
    options: dict[str, Any] = {
        "loss_fn": mixing(2)[0], "inner_lr": 0.1, "inner_steps": 3, "per_step_support": True,
        "adapt": ["2", "4"],
    }  # fmt: skip
    found = [
        gradients_of(model, fastmeta.maml_step(model, support, query, executor=name, **options))
        for name in ("fused", "generic")
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_any_number_of_threads_gives_the_same_bits():
    model, support, query = problem(40)
    options: dict[str, Any] = {
        "loss_fn": mixing(2)[0], "inner_lr": 0.1, "inner_steps": 2, "executor": "fused",
    }  # fmt: skip
    once = gradients_of(model, fastmeta.maml_step(model, support, query, **options))
    try:
        torch.set_num_threads(2)
        again = gradients_of(model, fastmeta.maml_step(model, support, query, **options))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(once, again)


def test_adapted_parameters():
    model, support, query = problem(5)
    options: dict[str, Any] = {"loss_fn": mixing(2)[0], "inner_lr": 0.1, "inner_steps": 2}
    ours = fastmeta.adapt(model, support, executor="fused", **options)
    theirs = fastmeta.adapt(model, support, executor="generic", **options)
    torch.testing.assert_close(ours(query[0]), theirs(query[0]), rtol=1e-9, atol=1e-12)


def test_a_step_within_a_step():
    """An update rule that takes a meta-step of its own has storage of its own."""
    model, support, query = problem(2)
    other, *sets = problem(3)

    class Nested(InnerOptimizer):
        def update(self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int) -> Any:
            with torch.enable_grad():
                inner = fastmeta.maml_step(
                    other, *sets, inner_lr=0.1, loss_fn=mixing(2)[0], executor="fused"
                )
            scale = 0.1 * float(inner.loss.detach())
            return {name: p - scale * gradients[name] for name, p in parameters.items()}, state

    options: dict[str, Any] = {
        "loss_fn": mixing(2)[0], "inner_steps": 2, "inner_optimizer": Nested(),
    }  # fmt: skip
    found = [
        gradients_of(model, fastmeta.maml_step(model, support, query, executor=name, **options))
        for name in ("fused", "generic")
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@cpu_only
def test_what_the_whole_compiled_step_serves_is_left_to_it():
    model, support, query = problem(3)
    out = fastmeta.maml_step(model, support, query, loss_fn=F.mse_loss, executor="fused")
    assert out.executor == "fused-cpu"


def test_what_is_no_mlp_is_refused():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2)).double()
    x, y = torch.randn(2, 5, 1, 4).double(), torch.randn(2, 5, 2).double()
    with pytest.raises(ValueError, match="'fused' can't serve"):
        fastmeta.maml_step(model, (x, y), (x, y), loss_fn=mixing(2)[0], executor="fused")
