"""The convolutional step under every update rule, with support sets by step and query losses.

Against autograd through torch's operators in float64, one task at a time.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutional import Average, Block, apart, flat, running
from fused_rules import updated
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from fastmeta import inner

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")

SETS = extension.instruction_sets()
TOLERANCE = 1e-9
"""In float64, relative to the whole gradient; a root's slope magnifies rounding."""
DRAWN = 60
IMAGE = (2, 6, 7)

NETWORKS: dict[str, Any] = {
    "pooled": lambda: [Block(2, 5), Block(5, 4, pool=1), *flat(4 * 9)],
    "strided-mean": lambda: [
        Block(2, 3, pool=1, stride=2), Block(3, 17, pool=1), Average(), nn.Linear(17, 3),
    ],
    "no-norm": lambda: [nn.Conv2d(2, 4, 3), nn.LeakyReLU(), nn.MaxPool2d(2), *flat(4 * 4)],
    "running": lambda: [nn.Conv2d(2, 4, 3), running(4), nn.ReLU(), *flat(4 * 20)],
}  # fmt: skip


@pytest.fixture(params=SETS, autouse=True)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("FASTMETA_ISA", request.param)
    return request.param


def learned(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


RULES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.1},
    "decay": {"weight_decay": 0.3},
    "adam": {"kind": "adam", "eps": 1e-2},
    "adam-decay": {"kind": "adam", "eps": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.3},
    "adamw": {"kind": "adam", "eps": 1e-2, "weight_decay": 0.1, "decoupled": True},
    "rmsprop": {"kind": "rmsprop", "beta2": 0.9, "eps": 1e-1, "weight_decay": 0.1},
    "rmsprop-centered": {
        "kind": "rmsprop", "beta2": 0.9, "eps": 1e-1, "centered": True, "momentum": 0.5,
    },
}  # fmt: skip


def optimizer(rule: dict[str, Any]) -> inner.InnerOptimizer:
    """The same of `fastmeta.inner`."""
    options = dict(rule)
    kind = options.pop("kind", "sgd")
    if kind == "sgd":
        return inner.SGD(**options)
    if kind == "rmsprop":
        return inner.RMSprop(alpha=options.pop("beta2"), **options)
    betas = options.pop("beta1", 0.9), options.pop("beta2", 0.999)
    decoupled = options.pop("decoupled", False)
    if decoupled:
        options.setdefault("weight_decay", 0.0)
    return (inner.AdamW if decoupled else inner.Adam)(betas=betas, **options)


@dataclass
class Case:
    """A meta-step: a network, its data and options, and every tensor that is learned."""

    model: nn.Module
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    steps: int
    rule: dict[str, Any]
    rates: Any
    adapted: list[str]
    prox: float = 0.0
    first_order: bool = False
    weights: list[float] | None = None
    per_step: bool = False
    loss: Any = F.cross_entropy
    query_loss: Any = None

    def leaves(self) -> list[Tensor]:
        """Parameters, then learned rates and options."""
        rates = self.rates.values() if isinstance(self.rates, dict) else [self.rates]
        numbers = [x for x in (*rates, *self.rule.values()) if isinstance(x, Tensor)]
        return [*self.model.parameters(), *(x for x in numbers if x.requires_grad)]

    def rate(self, name: str, step: int) -> Any:
        """The rate of a parameter at a step."""
        if not isinstance(self.rates, dict):
            by_step = isinstance(self.rates, Tensor) and self.rates.dim() == 1
            return self.rates[step] if by_step else self.rates
        rate = self.rates[name]
        by_step = rate.dim() > dict(self.model.named_parameters())[name].dim()
        return rate[step] if by_step else rate

    def compiled(self) -> tuple[Any, list[Tensor | None]]:
        """The compiled step, and the gradients of the leaves."""
        out = fastmeta.maml_step(
            self.model, self.support, self.query, inner_lr=self.rates, inner_steps=self.steps,
            inner_optimizer=optimizer(self.rule), loss_fn=self.loss, query_loss_fn=self.query_loss,
            first_order=self.first_order, adapt=self.adapted, prox=self.prox,
            step_weights=self.weights, per_step_support=self.per_step, executor="layered",
        )  # fmt: skip
        assert out.executor == "layered-cpu"
        return out, list(torch.autograd.grad(out.loss, self.leaves(), allow_unused=True))

    def exact(self) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Losses [T], support losses [K, T] and the gradients of the leaves, by autograd."""
        theta: dict[str, Tensor] = dict(self.model.named_parameters())
        weights = self.weights or [0.0] * self.steps + [1.0]
        query_loss = self.query_loss or self.loss
        losses, support_losses = [], []
        for t in range(len(self.query[0])):
            phi, state, total = dict(theta), {}, torch.zeros((), dtype=torch.float64)
            on_support = []
            for k in range(self.steps + 1):
                on_query = query_loss(self.at(phi, self.query[0][t]), self.query[1][t])
                total = total + weights[k] * on_query
                if k == self.steps:
                    break
                x, y = ((leaf[t, k] if self.per_step else leaf[t]) for leaf in self.support)
                loss = self.loss(self.at(phi, x), y)
                on_support.append(loss.detach())
                moving = [phi[name] for name in self.adapted]
                found = torch.autograd.grad(loss, moving, create_graph=True)
                g = [
                    one + self.prox * (phi[name] - theta[name])
                    for name, one in zip(self.adapted, found, strict=True)
                ]
                if self.first_order:
                    g = [one.detach() for one in g]
                options = {name: x for name, x in self.rule.items() if name != "kind"}
                rates = [self.rate(name, k) for name in self.adapted]
                kind = self.rule.get("kind", "sgd")
                moved = updated(kind, options, k, moving, g, rates, state)
                phi |= dict(zip(self.adapted, moved, strict=True))
            losses.append(total)
            support_losses.append(torch.stack(on_support) if on_support else torch.zeros(0))
        each = torch.stack(losses)
        found = torch.autograd.grad(each.mean(), self.leaves(), allow_unused=True)
        return each.detach(), torch.stack(support_losses, 1), list(found)

    def at(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The prediction."""
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        return functional_call(self.model, {**parameters, **buffers}, (x,))


def make(network: str, steps: int, rule: dict[str, Any], seed: int = 0, **options: Any) -> Case:
    """A case whose data a seed gives; `options` are those of `Case`."""
    torch.manual_seed(seed)
    model = nn.Sequential(*NETWORKS[network]()).double()
    sets = (2, steps) if options.get("per_step") else (2,)
    y: Tensor = torch.randint(3, (2, 5))
    if options.get("query_loss") is F.mse_loss:
        y = torch.randn(2, 5, 3).double()
    given: dict[str, Any] = {"rates": 0.1, "adapted": [n for n, _ in model.named_parameters()]}
    return Case(
        model, (torch.randn(*sets, 4, *IMAGE).double(), torch.randint(3, (*sets, 4))),
        (torch.randn(2, 5, *IMAGE).double(), y), steps, rule, **{**given, **options},
    )  # fmt: skip


def check(case: Case) -> None:
    losses, support_losses, expected = case.exact()
    out, found = case.compiled()
    torch.testing.assert_close(out.task_losses, losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.support_losses, support_losses, rtol=1e-9, atol=1e-10)
    assert apart(found, expected) < TOLERANCE
    # A learned number's gradient is nothing beside the whole one.
    for ours, exact in zip(found[::-1], expected[::-1], strict=True):
        if exact is None or exact.dim():
            break
        assert ours is not None
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-9)


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
        rule |= {"nesterov": True} if form == "nesterov" else {}
        rule |= {"dampening": 0.3} if form == "dampening" else {}
    elif kind == "adam":
        rule |= {"beta1": number(0.9, 0.8), "beta2": number(0.99, 0.7),
                 "eps": draw.choice([1e-1, 1e-2]), "eps_root": draw.choice([0.0, 1e-4]),
                 "decoupled": draw.random() < 0.5}  # fmt: skip
    else:
        rule |= {"beta2": number(0.9, 0.7), "eps": draw.choice([1.0, 1e-1]),
                 "momentum": number(0.6, 0.3) if draw.random() < 0.5 else 0.0,
                 "centered": draw.random() < 0.5}  # fmt: skip
    if draw.random() < 0.5:
        rule["weight_decay"] = 0.3
    if draw.random() < 0.5:
        rule["max_grad_norm"] = draw.choice([0.1, 0.5, 2.0])
    return rule


def draw_rates(draw: random.Random, case: Case) -> Any:
    """A number, one a step, or one for every element, of every parameter that adapts."""
    asks = draw.random() < 0.5
    form = draw.choice(["number", "steps", "elements"])
    if form == "elements":
        named = dict(case.model.named_parameters())
        by_step = draw.random() < 0.5
        return {
            name: (0.05 + 0.1 * torch.rand(*([case.steps] if by_step else []), *named[name].shape,
                                           dtype=torch.float64)).requires_grad_(asks)
            for name in case.adapted
        }  # fmt: skip
    shape = (case.steps,) if form == "steps" else ()
    return (0.05 + 0.1 * torch.rand(shape, dtype=torch.float64)).requires_grad_(asks)


def draw_case(seed: int) -> Case:
    """A rule with every other option of a step."""
    draw = random.Random(seed)
    steps = draw.choice([1, 2, 2, 3])
    case = make(
        draw.choice(list(NETWORKS)), steps, draw_rule(draw), seed, prox=draw.choice([0.0, 0.4]),
        first_order=draw.random() < 0.3, per_step=draw.random() < 0.3,
        query_loss=draw.choice([None, F.mse_loss]),
        weights=[draw.choice([0.0, 0.3, 0.7]) for _ in range(steps)] + [0.5],
    )  # fmt: skip
    if draw.random() < 0.4:  # of some the blocks in front are a body
        front = draw.randrange(len(case.adapted) - 1)
        some = [name for name in case.adapted[front:-1] if draw.random() < 0.7]
        case.adapted = [*some, case.adapted[-1]]
    case.rates = draw_rates(draw, case)
    return case


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn_steps_agree_with_autograd(seed: int) -> None:
    check(draw_case(seed))


@pytest.mark.parametrize("name", RULES)
def test_each_rule_agrees_with_autograd(name: str) -> None:
    check(make("pooled", 3, RULES[name], rates=learned(0.1)))


@pytest.mark.parametrize("network", NETWORKS)
def test_support_sets_by_step_agree_with_autograd(network: str) -> None:
    check(make(network, 3, {}, per_step=True, prox=0.3, weights=[0.1, 0.2, 0.3, 0.4]))


def test_a_body_is_run_on_every_steps_own_support_set() -> None:
    case = make("pooled", 2, {"momentum": 0.9}, per_step=True)
    case.adapted = case.adapted[-2:]
    check(case)


def test_query_losses_of_their_own_have_their_own_weights_and_ignored_label() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 0.5]).double(), ignore_index=1)
    case = make("pooled", 2, {"momentum": 0.9}, query_loss=loss)
    check(case)
    case.query_loss, case.loss = None, loss
    case.query[1][:, 0] = 1
    check(case)


@pytest.mark.parametrize("name", RULES)
def test_ragged_tasks_count_their_real_examples_alone(name: str) -> None:
    """Tasks of two sizes in one batch go where each of them goes alone."""
    case = make("no-norm", 2, RULES[name])
    whole = [(x[:n], y[:n]) for x, y, n in zip(*case.support, (4, 2), strict=True)]
    query = list(zip(*case.query, strict=True))
    losses, found = [], []
    for tasks in ([0, 1], [0], [1]):
        out = fastmeta.maml_step(
            case.model, [whole[t] for t in tasks], [query[t] for t in tasks], inner_lr=0.1,
            inner_steps=2, inner_optimizer=optimizer(case.rule), executor="layered",
        )  # fmt: skip
        losses.append(out.task_losses)
        found.append(torch.autograd.grad(out.loss, list(case.model.parameters())))
    torch.testing.assert_close(losses[0], torch.cat(losses[1:]))
    halves = [(a + b) / 2 for a, b in zip(*found[1:], strict=True)]
    assert apart(found[0], halves) < TOLERANCE


@pytest.mark.parametrize("name", RULES)
def test_float32_agrees_with_float64(name: str) -> None:
    """But for the biases in front of a norm, whose gradients are rounding."""
    case = make("no-norm", 2, RULES[name], prox=0.2)
    narrow = copy.deepcopy(case)
    narrow.model.float()
    narrow.support = (case.support[0].float(), case.support[1])
    narrow.query = (case.query[0].float(), case.query[1])
    assert apart(narrow.compiled()[1], case.compiled()[1]) < 1e-4


@pytest.mark.parametrize("name", ["adam", "rmsprop", "rmsprop-centered"])
def test_dead_filters_stay_and_their_proximal_terms_cancel(name: str) -> None:
    """The meta-gradient of what no support loss reaches is the query loss's at where it stayed."""
    rule = RULES[name] | {"eps": 1e-8, "weight_decay": 0.0}
    case = make("no-norm", 3, rule, prox=0.4, weights=[0.0, 0.0, 0.0, 1.0])
    first = case.model[0]
    assert isinstance(first, nn.Conv2d)
    with torch.no_grad():
        case.model[1] = nn.ReLU()
        first.bias[:2] = -100.0
        first.weight[:2] = 0.0
        first.weight[:2, 0, 1, 1] = 30.0
        case.query[0][:, :, 0] = 5.0
    _, found = case.compiled()
    adapted = fastmeta.adapt(
        case.model, case.support, inner_lr=0.1, inner_steps=3, prox=0.4,
        inner_optimizer=optimizer(case.rule),
    )  # fmt: skip
    expected = torch.zeros_like(first.weight)
    for t in range(2):
        theta = {name: p[t].detach().requires_grad_() for name, p in adapted.parameters.items()}
        loss = F.cross_entropy(case.at(theta, case.query[0][t]), case.query[1][t]) / 2
        expected += torch.autograd.grad(loss, theta["0.weight"])[0]
    assert all(g is not None and g.isfinite().all() for g in found)
    assert expected[:2].norm() > 1e-3
    assert found[0] is not None
    torch.testing.assert_close(found[0][:2], expected[:2], rtol=1e-9, atol=1e-10)


def test_a_learned_decay_goes_elsewhere() -> None:
    case = make("pooled", 1, {"weight_decay": learned(0.1)})
    out = fastmeta.maml_step(
        case.model, case.support, case.query, inner_optimizer=optimizer(case.rule),
        executor="layered",
    )  # fmt: skip
    assert out.executor == "layered-torch"
