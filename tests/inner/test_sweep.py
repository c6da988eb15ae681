"""A whole reverse sweep made of pullbacks, against autograd through the unrolled inner loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inner.cases import ALL, learned
from torch import Tensor, nn

from fastmeta.inner import Adam, InnerOptimizer
from fastmeta.inner.optimizer import no_cotangent

TASKS, STEPS, PROX = 3, 3, 0.3
NAMES = ("w", "b", "scale")
Tensors = dict[str, Tensor]


def start() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    theta = {
        "w": torch.randn(TASKS, 2, 4, dtype=torch.float64, generator=generator),
        "b": torch.randn(TASKS, 4, dtype=torch.float64, generator=generator),
        "scale": torch.ones(TASKS, dtype=torch.float64),
    }
    theta["b"][:, 0] = -100.0  # a dead unit
    return {name: p.requires_grad_() for name, p in theta.items()}


def features(theta: Tensors, x: Tensor) -> Tensor:
    hidden = torch.relu(torch.tanh(x @ theta["w"]) + theta["b"].unsqueeze(1))
    return theta["scale"].view(-1, 1) * hidden.sum(2)


def support_loss(theta: Tensors) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TASKS, 5, 2, dtype=torch.float64, generator=generator)
    return (features(theta, x) - x.sum(2)).square().mean(1).sum()


def query_loss(theta: Tensors) -> Tensor:
    """The gradient of the dead unit's entries is those entries."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TASKS, 4, 2, dtype=torch.float64, generator=generator)
    decay = sum(p.square().sum() for p in theta.values()) / 2
    return features(theta, x).sin().sum() + decay


def gradient(theta: Tensors, create_graph: bool = True) -> Tensors:
    found = torch.autograd.grad(
        support_loss(theta), [theta[n] for n in NAMES], create_graph=create_graph
    )
    return dict(zip(NAMES, found, strict=True))


def pulled(
    rule: InnerOptimizer, g: Tensors, state: Any, theta: Tensors, anchor: Tensors, prox: float
) -> Tensors:
    """The gradient with the proximal term, which has no derivative at entries that are still."""
    pull = {n: prox * (theta[n] - anchor[n]) for n in NAMES}
    still = rule.still({n: (g[n] + pull[n]).detach() for n in NAMES}, state)
    pull = {n: torch.where(still[n], 0.0, pull[n]) if n in still else pull[n] for n in NAMES}
    return {n: g[n] + pull[n] for n in NAMES}


def by_autograd(
    rule: InnerOptimizer, anchor: Tensors, rates: Tensors, prox: float, first_order: bool
) -> list[Tensor]:
    theta, state = anchor, rule.init(anchor)
    for k in range(STEPS):
        g = gradient(theta)
        if prox and k:
            g = pulled(rule, g, state, theta, anchor, prox)
        g = {n: each.detach() for n, each in g.items()} if first_order else g
        theta, state = rule.update(g, state, theta, rates, k)
    leaves = [*anchor.values(), *rates.values(), *rule.leaves().values()]
    found = torch.autograd.grad(query_loss(theta), leaves, allow_unused=True)
    return [torch.zeros_like(x) if f is None else f for x, f in zip(leaves, found, strict=True)]


def by_sweep(
    rule: InnerOptimizer, anchor: Tensors, rates: Tensors, prox: float, first_order: bool
) -> list[Tensor]:
    theta, state = anchor, rule.init(anchor)
    kept: list[Any] = []
    for k in range(STEPS):
        here = {n: p.detach().requires_grad_() for n, p in theta.items()}
        g = gradient(here, create_graph=False)
        g = {n: (g[n] + prox * (here[n] - anchor[n])).detach() for n in NAMES}
        kept.append((g, state, here))
        with torch.no_grad():
            theta, state = rule.update(g, state, here, rates, k)
    last = [theta[n].detach().requires_grad_() for n in NAMES]
    found = torch.autograd.grad(query_loss(dict(zip(NAMES, last, strict=True))), last)
    lambda_, sigma = dict(zip(NAMES, found, strict=True)), no_cotangent(state)
    totals: dict[str, Tensor] = {}

    def add(label: str, parts: Tensors) -> None:
        for name, part in parts.items():
            totals[f"{label}/{name}"] = totals.get(f"{label}/{name}", 0.0) + part  # type: ignore

    for k in reversed(range(STEPS)):
        g, state, theta = kept[k]
        found = rule.pullback(g, state, theta, rates, k, (lambda_, sigma), NAMES)
        add("rate", found.rates)
        add("option", found.options)
        lambda_, sigma = found.parameters, found.state
        if first_order:
            continue
        again = gradient(theta)
        product = torch.autograd.grad(
            [again[n] for n in NAMES],
            [theta[n] for n in NAMES],
            [found.gradients[n] for n in NAMES],
            allow_unused=True,
        )
        for n, part in zip(NAMES, product, strict=True):
            lambda_[n] = lambda_[n] if part is None else lambda_[n] + part
        for n, gamma in found.anchored.items() if prox else ():
            lambda_[n] = lambda_[n] + prox * gamma
            add("anchor", {n: -prox * gamma})
    of_theta, of_leaves = rule.pullback_init(anchor, sigma)
    add("option", of_leaves)
    add("anchor", of_theta)
    labels = [f"rate/{n}" for n in rates] + [f"option/{n}" for n in rule.leaves()]
    return [
        *(lambda_[n] + totals.get(f"anchor/{n}", 0.0) for n in anchor),
        *(totals[label] for label in labels),
    ]


class Preconditioner(InnerOptimizer, nn.Module):
    """A learned start of its momentum, and a learned matrix on the columns of each weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.start = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=generator))
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=generator))

    def init(self, parameters: Tensors) -> Any:
        return {"momentum": self.start * parameters["b"], "steps": torch.zeros(TASKS).long()}

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Any, step: int
    ) -> tuple[Tensors, Any]:
        momentum = 0.5 * state["momentum"] + gradients["b"]
        moved = {n: p - rates[n] * gradients[n] for n, p in parameters.items()}
        moved["w"] = parameters["w"] - rates["w"] * (gradients["w"] @ self.mix).tanh()
        moved["b"] = parameters["b"] - rates["b"] * momentum
        return moved, {"steps": state["steps"] + 1, "momentum": momentum}


class Decay(InnerOptimizer):
    """A rule of one learned number, without state."""

    def __init__(self) -> None:
        self.decay = learned(0.1)

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Any, step: int
    ) -> tuple[Tensors, Any]:
        return {
            n: p - rates[n] * (gradients[n] + self.decay * p.sin()) for n, p in parameters.items()
        }, state


OWN = {"own-module": Preconditioner, "own-number": Decay}


@pytest.mark.parametrize("order", ["second", "first"])
@pytest.mark.parametrize("prox", [0.0, PROX], ids=["plain", "prox"])
@pytest.mark.parametrize("name", [*ALL, *OWN])
def test_a_sweep_of_pullbacks_is_autograd_through_the_loop(name, prox, order):
    rule: Any = {**ALL, **OWN}[name]()
    anchor, rates = start(), {n: learned(0.05) for n in NAMES}
    found = by_sweep(rule, anchor, rates, prox, order == "first")
    expected = by_autograd(rule, anchor, rates, prox, order == "first")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["adam", "learned-adam-second", "rmsprop-centered"])
def test_entries_that_never_move_get_exactly_what_they_are_worth(name):
    anchor, rates = start(), {n: learned(0.05) for n in NAMES}
    of_w, of_b, *_ = by_sweep(ALL[name](), anchor, rates, PROX, first_order=False)
    assert torch.equal(of_w[:, :, 0], anchor["w"][:, :, 0].detach())
    assert torch.equal(of_b[:, 0], anchor["b"][:, 0].detach())


def test_a_zero_head_has_the_gradient_of_autograd():
    """At step 0 the body's gradient is 0 and its Hessian is not: a / eps is the derivative."""
    anchor, rates = start(), {n: learned(0.05) for n in NAMES}
    with torch.no_grad():
        anchor["scale"].zero_()
    rule = Adam(eps=1e-4)
    found = by_sweep(rule, anchor, rates, PROX, first_order=False)
    expected = by_autograd(rule, anchor, rates, PROX, first_order=False)
    assert expected[2].abs().max() > 1e2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_autograd_agrees_where_no_derivative_is_cut_off():
    """With a large epsilon nothing is lost to rounding in the proximal term's whole derivative."""
    anchor, rates = start(), {n: learned(0.05) for n in NAMES}

    class Whole(InnerOptimizer):
        init, update = staticmethod(Adam(eps=1e-2).init), staticmethod(Adam(eps=1e-2).update)

    expected = by_autograd(Whole(), anchor, rates, PROX, first_order=False)
    found = by_sweep(Adam(eps=1e-2), anchor, rates, PROX, first_order=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
