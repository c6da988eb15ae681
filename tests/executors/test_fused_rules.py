"""The update rules of the fused kernels: against autograd, and against torch.optim."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import ANCHORED, KERNELS, ON_HOST
from fused_rules import (
    BINARY,
    CROSS_ENTROPY,
    MSE,
    RELU,
    Case,
    Found,
    compiled,
    loss,
    network,
    reference,
)

DRAWN = 40 if ON_HOST else 80


@pytest.fixture(params=ANCHORED)
def kernel(request, monkeypatch) -> str:
    for name, value in KERNELS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


def learned(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def draw_rule(draw: random.Random) -> dict[str, Any]:
    """A rule with options; every second number that can be learned is."""

    def number(*values: float) -> Any:
        value = draw.choice(values)
        return learned(value) if draw.random() < 0.5 else value

    kind = draw.choice(["sgd", "adam", "rmsprop"])
    rule: dict[str, Any] = {"kind": kind}
    if kind == "sgd":
        rule["momentum"] = number(0.9, 0.5) if draw.random() < 0.8 else 0.0
        form = draw.choice(["", "nesterov", "dampening"]) if rule["momentum"] else ""
        if form == "nesterov":
            rule["nesterov"] = True
        elif form == "dampening":
            rule["dampening"] = 0.3
    elif kind == "adam":
        rule |= {"beta1": number(0.9, 0.8), "beta2": number(0.99, 0.7),
                 "eps": draw.choice([1e-2, 1e-3]), "eps_root": draw.choice([0.0, 1e-4]),
                 "decoupled": draw.random() < 0.5}  # fmt: skip
    else:
        rule |= {"beta2": number(0.9, 0.7), "eps": draw.choice([1e-1, 1e-2]),
                 "momentum": number(0.6, 0.3) if draw.random() < 0.5 else 0.0,
                 "centered": draw.random() < 0.5}  # fmt: skip
    if draw.random() < 0.5:
        rule["weight_decay"] = 0.3
    if draw.random() < 0.5:
        rule["max_grad_norm"] = draw.choice([0.1, 0.5, 2.0])
    return rule


def draw_case(seed: int) -> Case:
    """A rule with every other option of a step."""
    draw = random.Random(seed)
    widths = draw.choice([(3, 5, 4, 2), (2, 17, 3), (1, 7, 1), (4, 3), (5, 18, 6, 3)])
    steps = draw.choice([0, 1, 2, 3, 4])
    count = 2 * (len(widths) - 1)
    adapted: tuple[bool, ...] = ()
    if draw.random() < 0.4:  # of half of these the layers in front are a body
        front = draw.randrange(count - 1) if draw.random() < 0.5 else 0
        adapted = (*[i >= front and draw.random() < 0.6 for i in range(count - 1)], True)
    weights: tuple[float, ...] = ()
    if draw.random() < 0.5:
        weights = tuple(draw.choice([0.0, 0.3, 0.7]) for _ in range(steps + 1))
    return Case(
        widths=widths, tasks=3, support=draw.choice([1, 4, 6]), query=draw.choice([2, 5]),
        steps=steps, rule=draw_rule(draw), elementwise=draw.random() < 0.4,
        learned_rates=draw.random() < 0.5, first_order=draw.random() < 0.3,
        prox=draw.choice([0.0, 0.0, 0.4]), step_weights=weights, adapted=adapted,
        ragged=draw.random() < 0.3, per_step=draw.random() < 0.3,
        support_loss=draw.choice([MSE, BINARY]), seed=seed, **draw_query_loss(draw, widths[-1]),
        memory=draw.choice(["", "reversible"]),
    )  # fmt: skip


def draw_query_loss(draw: random.Random, classes: int) -> dict[str, Any]:
    """A loss of the query set, of another kind or with options of its own."""
    if classes == 1 or draw.random() < 0.5:
        return {"query_loss": MSE}
    options: dict[str, Any] = {"label_smoothing": draw.choice([0.0, 0.2])}
    if draw.random() < 0.5:
        options["weight"] = torch.tensor([0.5 + i for i in range(classes)], dtype=torch.float64)
    if draw.random() < 0.3:
        options["ignore_index"] = -1
    return {"query_loss": CROSS_ENTROPY, "query_options": options}


def check(found: Found, expected: Found, tolerance: float) -> None:
    wanted = expected.tensors()
    assert found.tensors().keys() == wanted.keys()
    for name, tensor in found.tensors().items():
        apart = (tensor.double() - wanted[name]).norm()
        assert apart <= tolerance * (1 + wanted[name].norm()), f"{name}: {apart}"


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn_steps_agree_with_autograd(seed: int, kernel: str) -> None:
    case = draw_case(seed)
    check(compiled(case), reference(case), 1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_momentum_steps_in_dual_form_too(
    nesterov: bool, first_order: bool, steps: int, kernel: str
) -> None:
    rule = {"momentum": 0.8, "nesterov": nesterov, "dampening": 0.0 if nesterov else 0.3}
    case = Case(
        widths=(19, 5, 3), steps=steps, rule=rule, first_order=first_order, form="dual",
        step_weights=(0.3,) * steps + (1.0,), adapted=(True, True, False, True),
    )  # fmt: skip
    found = compiled(case)
    assert found.form == "dual"
    check(found, reference(case), 1e-10)


@pytest.mark.skipif(ON_HOST, reason="CUDA takes no dual form there")
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.8, "dampening": 0.3}], ids=["sgd", "momentum"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_support_set_for_each_step_in_dual_form(
    rule: dict[str, Any], first_order: bool, steps: int, kernel: str
) -> None:
    case = Case(
        widths=(19, 5, 3), steps=steps, rule=rule, first_order=first_order, form="dual",
        step_weights=(0.3,) * steps + (1.0,), per_step=True, learned_rates=not rule,
    )  # fmt: skip
    found = compiled(case)
    assert found.form == "dual"
    check(found, reference(case), 1e-10)


RULES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "decay": {"weight_decay": 0.1},
    "adam": {"kind": "adam"},
    "adam-decay": {"kind": "adam", "weight_decay": 0.1},
    "adamw": {"kind": "adam", "weight_decay": 0.1, "decoupled": True},
    "rmsprop": {"kind": "rmsprop", "beta2": 0.99, "weight_decay": 0.1},
    "rmsprop-momentum": {"kind": "rmsprop", "beta2": 0.99, "momentum": 0.5},
    "rmsprop-centered": {
        "kind": "rmsprop", "beta2": 0.99, "centered": True, "momentum": 0.5, "eps": 1e-2,
    },
}  # fmt: skip


def optimizer(rule: dict[str, Any], parameters: list[Tensor], rate: float) -> Any:
    """torch.optim's of the same numbers."""
    options = dict(rule)
    kind = options.pop("kind", "sgd")
    if kind == "sgd":
        return torch.optim.SGD(parameters, rate, **options)
    if kind == "rmsprop":
        return torch.optim.RMSprop(parameters, rate, alpha=options.pop("beta2"), **options)
    decoupled = options.pop("decoupled", False)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        parameters, rate, weight_decay=options.get("weight_decay", 0.0)
    )


@pytest.mark.parametrize("name", RULES)
def test_a_hundred_steps_go_where_torch_optim_goes(name: str, kernel: str) -> None:
    case = Case(tasks=2, steps=100, rule=RULES[name], rate=0.0, seed=3)
    case.rates = [torch.full_like(rate, 0.02) for rate in case.rates]
    found = compiled(case, differentiate=False).adapted
    for task in range(case.tasks):
        parameters = [p.clone().requires_grad_() for p in case.parameters]
        inner = optimizer(RULES[name], parameters, 0.02)
        for _ in range(case.steps):
            inner.zero_grad()
            output = network(case, parameters, case.support_x[task])
            loss(MSE, output, case.support_y[task], None).backward()
            inner.step()
        for p, q in zip(found, parameters, strict=True):
            torch.testing.assert_close(p[task], q.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_float32_agrees_with_float64(name: str, kernel: str) -> None:
    rule = RULES[name] | {"eps": 1e-2} if "kind" in RULES[name] else RULES[name]
    case = Case(steps=3, rule=rule, learned_rates=True, prox=0.2, seed=5)
    # A root's slope magnifies rounding by 1 / eps.
    check(
        compiled(case.with_dtype(torch.float32)), compiled(case), 1e-3 if "kind" in rule else 2e-5
    )


def with_dead_units(steps: int, rule: dict[str, Any]) -> Case:
    """A network of which three units reach the query loss, but no support loss."""
    case = Case(
        widths=(3, 6, 2), steps=steps, rule=rule, prox=0.4, activation=RELU, learned_rates=True,
        step_weights=(0.2,) * steps + (1.0,),
    )  # fmt: skip
    case.parameters[0][:3] = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    case.parameters[1][:3] = -100.0
    case.query_x[:, 0] = torch.tensor([51.0, 0.3, -0.2], dtype=torch.float64)
    return case


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "rmsprop-centered"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_dead_units_stay_and_their_proximal_terms_cancel(
    name: str, steps: int, eps: float, kernel: str
) -> None:
    """A second moment of zero leaves no NaN, and the meta-gradient there is the query losses'."""
    rule = RULES[name] | {"eps": eps, "weight_decay": 0.0}
    case = with_dead_units(steps, rule)
    found = compiled(case)
    assert all(tensor.isfinite().all() for tensor in found.tensors().values())
    expected = [torch.zeros_like(p) for p in case.parameters]
    for k in range(steps + 1):
        adapted = compiled(with_dead_units(k, rule), differentiate=False).adapted
        for t in range(case.tasks):
            theta = [p[t].clone().requires_grad_() for p in adapted]
            value = loss(MSE, network(case, theta, case.query_x[t]), case.query_y[t], None)
            scaled = case.weights[k] * case.task_weights[t] * value
            for sums, g in zip(expected, torch.autograd.grad(scaled, theta), strict=True):
                sums += g
            for p, before in zip(theta[:2], case.parameters[:2], strict=True):
                assert torch.equal(p[:3], before[:3])
    for g, wanted in zip(found.parameters[:2], expected[:2], strict=True):
        assert wanted[:3].norm() > 0.1
        torch.testing.assert_close(g[:3], wanted[:3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "decay", [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "decoupled": True}]
)
def test_with_decay_a_dead_unit_moves_with_its_anchor(decay: dict[str, Any], kernel: str) -> None:
    """Zeros among its weights get no gradient; the proximal terms don't cancel there."""
    case = with_dead_units(3, {"kind": "adam", "eps_root": 1e-4, **decay})
    check(compiled(case), reference(case), 1e-10)
