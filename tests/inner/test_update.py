"""The update of every rule against `torch.optim`, and under the transforms of `torch.func`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inner.cases import ALL, CLIPPED, DEAD, RULES, SHAPES, TASKS, drawn, rates
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fastmeta.inner import SGD, Adam, AdamW, InnerOptimizer, RMSprop
from fastmeta.inner.one_task import one_task

STEPS = 100


def torchs(rule: Any, parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    """The optimizer of torch with the options of a rule."""
    if isinstance(rule, SGD):
        return torch.optim.SGD(
            parameters,
            rate,
            momentum=as_number(rule.momentum),
            dampening=as_number(rule.dampening),
            nesterov=rule.nesterov,
            weight_decay=as_number(rule.weight_decay),
        )
    if isinstance(rule, RMSprop):
        return torch.optim.RMSprop(
            parameters,
            rate,
            alpha=as_number(rule.alpha),
            eps=rule.eps,
            weight_decay=as_number(rule.weight_decay),
            momentum=as_number(rule.momentum),
            centered=rule.centered,
        )
    kind = torch.optim.AdamW if isinstance(rule, AdamW) else torch.optim.Adam
    betas = (as_number(rule.betas[0]), as_number(rule.betas[1]))
    return kind(
        parameters, rate, betas=betas, eps=rule.eps, weight_decay=as_number(rule.weight_decay)
    )


def as_number(option: Any) -> float:
    return option.item() if isinstance(option, Tensor) else option


def clip(parameters: list[Tensor], largest: float | None) -> None:
    """Exactly to the norm, where `clip_grad_norm_` divides by `n + 1e-6`."""
    norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()  # type: ignore
    if largest is not None and norm > largest:
        for p in parameters:
            p.grad *= largest / norm  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name in ALL if "-root" not in name])
def test_a_hundred_steps_are_those_of_torch(name):
    generator = torch.Generator().manual_seed(0)
    rule, rate = ALL[name](), 0.01
    start = drawn(generator)
    steps = [drawn(generator, dead=True) for _ in range(STEPS)]
    theta, state = start, rule.init(start)
    with torch.no_grad():
        for k, noise in enumerate(steps):
            g = {n: noise[n] + 0.1 * theta[n].sin() * (noise[n] != 0) for n in theta}
            theta, state = rule.update(g, state, theta, dict.fromkeys(theta, rate), k)
    for task in range(TASKS):
        parameters = {n: torch.nn.Parameter(start[n][task].clone()) for n in start}
        optimizer = torchs(rule, [*parameters.values()], rate)
        for noise in steps:
            for n, p in parameters.items():
                p.grad = noise[n][task] + 0.1 * p.detach().sin() * (noise[n][task] != 0)
            clip([*parameters.values()], rule.max_grad_norm)  # type: ignore[attr-defined]
            optimizer.step()
        for n, p in parameters.items():
            torch.testing.assert_close(theta[n][task], p.detach(), rtol=1e-11, atol=1e-12)


def test_a_root_of_epsilon_is_under_the_root():
    rule = Adam(eps=0.5, eps_root=0.25)
    theta = {"w": torch.ones(1, 1).double()}
    moved, _ = rule.update({"w": theta["w"] * 2}, rule.init(theta), theta, {"w": 0.1}, 0)
    torch.testing.assert_close(moved["w"].item(), 1 - 0.1 * 2 / ((4 + 0.25) ** 0.5 + 0.5))


def norm(tensors: dict[str, Tensor]) -> Tensor:
    """Of each task's tensors."""
    return torch.cat([each.reshape(TASKS, -1) for each in tensors.values()], 1).norm(dim=1)


def test_a_clipped_gradient_has_the_largest_norm():
    generator = torch.Generator().manual_seed(1)
    theta, g = drawn(generator), drawn(generator)
    g = {
        n: each * torch.tensor([0.01, 1.0, 10.0]).view(-1, *(1,) * len(SHAPES[n]))
        for n, each in g.items()
    }
    moved, _ = SGD(max_grad_norm=1.0).update(
        g, dict.fromkeys(g, ()), theta, dict.fromkeys(g, 1.0), 0
    )
    norms, raw = norm({n: theta[n] - moved[n] for n in theta}), norm(g)
    torch.testing.assert_close(norms, raw.clamp(max=1.0), rtol=1e-12, atol=0.0)
    assert (raw > 1).tolist() == [False, True, True]


def test_a_centered_root_of_less_than_nothing_is_zero():
    rule = RMSprop(alpha=0.5, centered=True)
    theta = {"w": torch.zeros(1, 1)}
    state = rule.init(theta)
    for k in range(80):  # v and the squared mean meet: their difference is 0 or rounding below
        theta, state = rule.update({"w": torch.full((1, 1), 0.3)}, state, theta, {"w": 1e-8}, k)
        assert theta["w"].isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dead", ["dead-units", "no-gradient-at-all"])
def test_second_derivatives_are_finite(name, dead):
    """Of two steps, where second moments are 0; both derivatives by autograd through `update`."""
    generator = torch.Generator().manual_seed(2)
    rule = ALL[name]()
    size = 0.0 if dead == "no-gradient-at-all" else 1.0
    start = {n: p.requires_grad_() for n, p in drawn(generator).items()}
    noise = [{n: size * g for n, g in drawn(generator, dead=True).items()} for _ in range(2)]
    theta, state = start, rule.init(start)
    for k in range(2):
        g = {n: noise[k][n] * theta[n].cos() for n in theta}
        theta, state = rule.update(g, state, theta, rates("scalar", generator), k)
    leaves = [*start.values(), *rule.leaves().values()]
    loss = sum(p.square().sum() for p in theta.values())
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    first = [each for each in first if each is not None]
    assert all(each.isfinite().all() for each in first)
    curved = sum(each.square().sum() for each in first)
    second = torch.autograd.grad(curved, leaves, allow_unused=True)
    assert all(each.isfinite().all() for each in second if each is not None)


@pytest.mark.parametrize("name", ALL)
def test_single_tasks_under_vmap_are_all_tasks_at_once(name):
    generator = torch.Generator().manual_seed(3)
    rule = ALL[name]()
    a = rates("element", generator)
    theta = drawn(generator)
    single = one_task(rule)
    state, states = rule.init(theta), vmap(single.init)(theta)
    for k in range(3):
        g = drawn(generator, dead=True)
        mapped = vmap(lambda g, s, theta, k=k: single.update(g, s, theta, a, k))
        separate, states = mapped(g, states, theta)
        theta, state = rule.update(g, state, theta, a, k)
        torch.testing.assert_close((separate, states), (theta, state), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("learned-")])
def test_leaves_are_replaced_for_torch_func(name):
    generator = torch.Generator().manual_seed(4)
    rule = ALL[name]()
    theta, g = drawn(generator), drawn(generator)
    theta["b"].requires_grad_()  # a dampening without momentum is not used
    a = rates("scalar", generator)

    def moved(rule: InnerOptimizer) -> Tensor:
        here, state = rule.update(g, rule.init(theta), theta, a, 0)
        here, _ = rule.update(g, state, here, a, 1)
        return sum(p.square().sum() for p in here.values())  # type: ignore[return-value]

    leaves = rule.leaves()
    assert leaves
    expected = torch.autograd.grad(moved(rule), [*leaves.values()], allow_unused=True)
    fixed = {n: leaf.detach() for n, leaf in leaves.items()}
    found = grad(lambda leaves: moved(rule.with_leaves(leaves)))(fixed)
    for got, want in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("name", [*RULES, *CLIPPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(name, dtype):
    generator = torch.Generator().manual_seed(5)
    rule = ALL[name]()
    theta, g = ({n: each.to(dtype) for n, each in drawn(generator).items()} for _ in range(2))
    after = rule.update(g, rule.init(theta), theta, dict.fromkeys(theta, 0.1), 0)
    found = rule.pullback(g, rule.init(theta), theta, dict.fromkeys(theta, 0.1), 0, after)
    of_all = (after, found.parameters, found.state, found.gradients, found.anchored)
    assert {each.dtype for each in pytree.tree_leaves(of_all)} == {dtype}


def test_dead_entries_do_not_move_without_decay():
    generator = torch.Generator().manual_seed(6)
    theta, g = drawn(generator), drawn(generator, dead=True)
    moved, _ = Adam().update(g, Adam().init(theta), theta, dict.fromkeys(theta, 0.1), 0)
    for name, entries in DEAD.items():
        assert torch.equal(moved[name][entries], theta[name][entries])
