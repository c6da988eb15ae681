"""Rules of a user's own: those that docs/inner_optimizers.md shows, and where they may go wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fastmeta.inner import SGD, InnerOptimizer
from fastmeta.inner.argument import inner_optimizer
from fastmeta.inner.one_task import one_task
from fastmeta.inner.optimizer import no_cotangent

PAGE = Path(__file__).parents[2] / "docs" / "inner_optimizers.md"
TASKS = 3


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The names that the page's classes are given."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if "class " in block:
            exec(compile(block, PAGE.name, "exec"), names)
    return names


def rules(shown: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return {
        "preconditioner": shown["Preconditioner"](model).double(),
        "lstm": shown["CoordinatewiseLSTM"](4).double(),
    }


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}
    return {
        n: torch.randn(TASKS, *shape, dtype=torch.float64, generator=generator)
        for n, shape in shapes.items()
    }


def test_the_preconditioner_begins_as_gradient_descent(shown):
    theta, g = tensors(0), tensors(1)
    rates = dict.fromkeys(theta, 0.1)
    moved, _ = rules(shown)["preconditioner"].update(g, (), theta, rates, 0)
    expected, _ = SGD().update(g, SGD().init(theta), theta, rates, 0)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("name", ["preconditioner", "lstm"])
def test_its_parameters_get_the_gradients_of_autograd(shown, name):
    """Two steps: whole, and by pullbacks whose gradients of the leaves add up."""
    rule = rules(shown)[name]
    assert inner_optimizer(rule) is rule
    start, gs, rates = tensors(0), [tensors(1), tensors(2)], dict.fromkeys(tensors(0), 0.1)
    path: list[Any] = [(start, rule.init(start))]
    for k, g in enumerate(gs):
        theta, state = path[-1]
        path.append(rule.update(g, state, theta, rates, k))
    cotangents = (tensors(3), no_cotangent(path[-1][1]))
    total = sum((path[-1][0][n] * cotangents[0][n]).sum() for n in start)
    leaves = rule.leaves()
    assert leaves == dict(rule.named_parameters())
    expected = torch.autograd.grad(total, [*leaves.values()])
    sums = {n: torch.zeros_like(leaf) for n, leaf in leaves.items()}
    with torch.no_grad():
        for k in (1, 0):
            theta, state = path[k]
            found = rule.pullback(gs[k], state, theta, rates, k, cotangents)
            cotangents = (found.parameters, found.state)
            sums = {n: sums[n] + found.options[n] for n in sums}
    torch.testing.assert_close([*sums.values()], [*expected], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["preconditioner", "lstm"])
def test_it_runs_for_single_tasks_under_torch_func(shown, name):
    rule = rules(shown)[name]
    theta, g, rates = tensors(0), tensors(1), dict.fromkeys(tensors(0), 0.1)

    def loss(leaves: Any, theta: Any, g: Any) -> Any:
        bound = one_task(rule.with_leaves(leaves))
        state = bound.init(theta)
        moved, state = bound.update(g, state, theta, rates, 0)
        moved, _ = bound.update(g, state, moved, rates, 1)
        return sum(p.square().sum() for p in moved.values())

    leaves = {n: p.detach() for n, p in rule.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(leaves, theta, g)
    moved, state = rule.update(g, rule.init(theta), theta, rates, 0)
    moved, _ = rule.update(g, state, moved, rates, 1)
    total = sum(p.square().sum() for p in moved.values())
    expected = torch.autograd.grad(total, [*rule.parameters()])
    for part, want in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(part.sum(0), want, rtol=1e-10, atol=1e-12)


def test_a_state_may_hold_integers_and_any_order_of_names():
    class Odd(InnerOptimizer):
        def init(self, parameters: Any) -> Any:
            return {"count": torch.zeros(TASKS, dtype=torch.long), "mean": parameters}

        def update(self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int) -> Any:
            names = list(reversed(parameters))
            mean = {n: 0.5 * state["mean"][n] + gradients[n] for n in names}
            moved = {n: parameters[n] - rates[n] * mean[n] for n in names}
            return moved, {"mean": mean, "count": state["count"] + 1}

    rule, theta, g = Odd(), tensors(0), tensors(1)
    state, lambda_ = rule.init(theta), tensors(2)
    rates = dict.fromkeys(theta, 0.1)
    _, after = rule.update(g, state, theta, rates, 0)
    found = rule.pullback(g, state, theta, rates, 0, (lambda_, no_cotangent(after)))
    assert found.anchored == {}  # at step 0
    torch.testing.assert_close(found.parameters, lambda_)
    torch.testing.assert_close(found.gradients, {n: -0.1 * each for n, each in lambda_.items()})
    expected = {n: -0.05 * each for n, each in lambda_.items()}
    torch.testing.assert_close(found.state["mean"], expected)
    assert torch.equal(found.state["count"], torch.zeros(TASKS, dtype=torch.long))
    of_theta, options = rule.pullback_init(theta, found.state)
    torch.testing.assert_close(of_theta, expected)
    assert options == {}


def test_a_rule_without_update_says_so():
    class Nothing(InnerOptimizer):
        pass

    rule = Nothing()
    assert pytree.tree_leaves(rule.init({})) == []
    with pytest.raises(NotImplementedError, match="Nothing: it must define update"):
        rule.update({}, (), {}, {}, 0)
