"""The pullback of every rule against autograd through its update, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inner.cases import ALL, DEAD, LEARNED, SHAPES, drawn, drawn_like, rates
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner import SGD, Adam, RMSprop
from fastmeta.inner.one_task import one_task

RATES = ("number", "scalar", "row", "element", "task")


def close(found: Any, expected: Any, label: str) -> None:
    """Each entry to 1e-12; the cotangents that are drawn are of size 1."""
    torch.testing.assert_close(
        found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{label}: {text}"
    )


def by_autograd(
    rule: Any, g: Any, state: Any, theta: Any, a: Any, step: int, cotangents: Any, names: Any
) -> tuple[Any, ...]:
    """Cotangents of `(theta, state, g, rates, leaves)`, written without the package."""
    leaves = rule.leaves()
    inputs = (theta, state, g, {name: a[name] for name in names})
    inputs = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(), inputs)
    theta, state, g, own = inputs
    after = rule.update(g, state, theta, {**a, **own}, step)
    pairs = zip(pytree.tree_leaves(after), pytree.tree_leaves(cotangents), strict=True)
    total = sum((one * other).sum() for one, other in pairs)
    tensors, spec = pytree.tree_flatten((*inputs, leaves))
    found = torch.autograd.grad(total, tensors, allow_unused=True)
    found = [torch.zeros_like(x) if f is None else f for x, f in zip(tensors, found, strict=True)]
    return pytree.tree_unflatten(found, spec)


def check(rule: Any, kind: str, seed: int, steps: int = 3) -> None:
    """Three steps whose state is chained; gradients of some entries are 0 always, or at first."""
    generator = torch.Generator().manual_seed(seed)
    theta, a = drawn(generator), rates(kind, generator)
    names = () if kind == "number" else tuple(SHAPES)
    state = rule.init(theta)
    for k in range(steps):
        g = drawn(generator, dead=True)
        if k == 0:
            g["w"][:, :, 1] = 0.0
        after = pytree.tree_map(torch.Tensor.detach, rule.update(g, state, theta, a, k))
        cotangents = drawn_like(after, generator)
        found = rule.pullback(g, state, theta, a, k, cotangents, names)
        expected = by_autograd(rule, g, state, theta, a, k, cotangents, names)
        of_all = (found.parameters, found.state, found.gradients, found.rates, found.options)
        for got, want, label in zip(
            of_all, expected, ("parameters", "state", "gradients", "rates", "options"), strict=True
        ):
            close(got, want, f"step {k}, {label}")
        theta, state = after


@pytest.mark.parametrize("name", ALL)
def test_pullback_is_that_of_autograd(name):
    check(ALL[name](), "element", seed=0)


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("name", ["sgd-all", "adam-all", "adamw-all", "rmsprop-all"])
def test_every_form_of_rate(name, kind):
    check(LEARNED[name](), kind, seed=1)


@pytest.mark.parametrize("name", ALL)
def test_one_task_is_a_batch_of_one(name):
    generator = torch.Generator().manual_seed(2)
    rule, a = ALL[name](), rates("element", generator)
    theta, g, cotangent = (drawn(generator) for _ in range(3))
    state = rule.init(theta)
    sigma = drawn_like(pytree.tree_map(torch.Tensor.clone, state), generator)
    given = pytree.tree_map(lambda x: x[1], (g, state, theta))
    found = one_task(rule).pullback(
        *given, a, 1, pytree.tree_map(lambda x: x[1], (cotangent, sigma)), ("w",)
    )
    given = pytree.tree_map(lambda x: x[1:2], (g, state, theta))
    expected = rule.pullback(
        *given, a, 1, pytree.tree_map(lambda x: x[1:2], (cotangent, sigma)), ("w",)
    )
    for label in ("parameters", "state", "gradients", "anchored"):
        close(
            getattr(found, label), pytree.tree_map(lambda x: x[0], getattr(expected, label)), label
        )
    g, state, _ = given
    still = one_task(rule).still(*pytree.tree_map(lambda x: x[0], (g, state)))
    close(still, pytree.tree_map(lambda x: x[0], rule.still(g, state)), "still")
    for label in ("rates", "options"):
        close(getattr(found, label), getattr(expected, label), label)


@pytest.mark.parametrize("rule", [Adam(), RMSprop(), RMSprop(centered=True, momentum=0.9)])
def test_the_proximal_term_passes_entries_that_have_not_moved(rule):
    generator = torch.Generator().manual_seed(3)
    theta, lambda_ = drawn(generator), drawn(generator)
    state = rule.init(theta)
    sigma = drawn_like(pytree.tree_map(torch.Tensor.clone, state), generator)
    g = drawn(generator, dead=True)
    rates = dict.fromkeys(theta, 0.1)
    assert rule.pullback(g, state, theta, rates, 0, (lambda_, sigma)).anchored == {}
    found = rule.pullback(g, state, theta, rates, 1, (lambda_, sigma))
    for name in theta:
        still = torch.zeros_like(theta[name], dtype=torch.bool)
        if name in DEAD:
            still[DEAD[name]] = True
        assert torch.equal(still, found.anchored[name] == 0)
        assert torch.equal(found.anchored[name][~still], found.gradients[name][~still])
        if name in DEAD:
            assert found.gradients[name][still].abs().min() > 1e3  # a lambda / eps


@pytest.mark.parametrize("rule", [Adam(weight_decay=0.1), SGD(0.9)])
def test_the_proximal_term_passes_nothing_else(rule):
    """With decay an entry at 0 has gradient 0, and yet moves with where it starts."""
    generator = torch.Generator().manual_seed(4)
    theta = drawn(generator, dead=True)
    state = rule.init(theta)
    g = drawn(generator, dead=True)
    given = (theta, drawn_like(pytree.tree_map(torch.Tensor.clone, state), generator))
    found = rule.pullback(g, state, theta, dict.fromkeys(theta, 0.1), 1, given)
    assert rule.still(g, state) == {}
    close(found.anchored, found.gradients, "anchored")


@pytest.mark.parametrize(
    "rule", [Adam((0.0, 0.9)), Adam((0.9, 0.0)), RMSprop(0.0), RMSprop(torch.tensor(0.0))]
)
def test_entries_that_once_moved_are_not_still(rule):
    generator = torch.Generator().manual_seed(6)
    theta, a = drawn(generator), dict.fromkeys(SHAPES, 0.1)
    state = rule.init(theta)
    none = {n: torch.zeros_like(p) for n, p in theta.items()}
    for k, g in enumerate((drawn(generator), none)):
        theta, state = rule.update(g, state, theta, a, k)
    assert not any(mask.any() for mask in rule.still(none, state).values())


def test_norms_beyond_the_range_clip_to_nothing():
    theta = {"w": torch.ones(1, 2)}
    g = {"w": torch.tensor([[1e30, 1.0]])}
    rule = SGD(max_grad_norm=1.0)
    moved, _ = rule.update(g, {"w": ()}, theta, {"w": 0.1}, 0)
    assert torch.equal(moved["w"], theta["w"])
    found = rule.pullback(g, {"w": ()}, theta, {"w": 0.1}, 0, (theta, {"w": ()}))
    assert torch.equal(found.gradients["w"], torch.zeros(1, 2))


def test_theta_shared_by_the_tasks_broadcasts():
    """At step 0 an executor may hold one `theta_0` for all tasks, `[1, ...]`."""
    generator = torch.Generator().manual_seed(5)
    g, lambda_ = drawn(generator), drawn(generator)
    rule: Any = LEARNED["adamw-all"]()
    one = {n: p[:1] for n, p in drawn(generator).items()}
    many: dict[str, Tensor] = {n: p.expand_as(g[n]) for n, p in one.items()}
    results: list[Any] = []
    for theta in (one, many):
        state, a = rule.init(theta), dict.fromkeys(theta, torch.tensor(0.1).double())
        _, after = rule.update(g, state, theta, a, 0)
        sigma = pytree.tree_map(torch.ones_like, after)
        found = rule.pullback(g, state, theta, a, 0, (lambda_, sigma), tuple(theta))
        results.append((found.parameters, found.gradients, found.rates, found.options))
    close(results[0], results[1], "shared")
