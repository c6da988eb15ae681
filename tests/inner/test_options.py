"""Options of update rules: what is refused, what a plan depends on, and what kernels are told."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from inner.cases import ALL, learned
from torch import nn

import fastmeta
from fastmeta.inner import SGD, Adam, AdamW, InnerOptimizer, RMSprop
from fastmeta.inner.argument import inner_optimizer
from fastmeta.inner.kernel_rule import KERNEL_OPTIONS

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "negative-momentum": (
        SGD,
        {"momentum": -0.1},
        ValueError,
        "momentum: -0.1; it must not be neg",
    ),
    "momentum-nan": (SGD, {"momentum": math.nan}, ValueError, "momentum: nan; it must not be neg"),
    "momentum-bool": (SGD, {"momentum": True}, TypeError, "momentum: a bool; it must be a number"),
    "momentum-string": (SGD, {"momentum": "0.9"}, TypeError, "or a 0-d tensor"),
    "momentum-vector": (SGD, {"momentum": torch.ones(2)}, ValueError, "momentum: shape [2]; a ten"),
    "momentum-integer-tensor": (SGD, {"momentum": torch.tensor(1)}, TypeError, "floating point"),
    "dampening": (SGD, {"dampening": -1}, ValueError, "dampening: -1; it must not be negative"),
    "nesterov-alone": (SGD, {"nesterov": True}, ValueError, "nesterov: True, but momentum is 0"),
    "nesterov-dampened": (
        SGD,
        {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
        ValueError,
        "nesterov: True, but dampening is 0.1; it must be 0",
    ),
    "nesterov-number": (SGD, {"nesterov": 1}, TypeError, "nesterov: 1; it must be True or False"),
    "decay": (SGD, {"weight_decay": -1e-4}, ValueError, "weight_decay: -0.0001; it must not be"),
    "decay-infinite": (AdamW, {"weight_decay": math.inf}, ValueError, "weight_decay: inf; it must"),
    "beta-one": (Adam, {"betas": (0.9, 1.0)}, ValueError, "betas[1]: 1.0; it must be of [0, 1)"),
    "beta-negative": (Adam, {"betas": (-0.1, 0.9)}, ValueError, "betas[0]: -0.1; it must be of"),
    "beta-none": (AdamW, {"betas": (None, 0.9)}, TypeError, "betas[0]: a NoneType; it must be a"),
    "betas-number": (Adam, {"betas": 0.9}, TypeError, "betas: a float; it must be a pair"),
    "betas-three": (Adam, {"betas": (0.9,) * 3}, ValueError, "betas: 3 entries; it must be a pair"),
    "eps": (Adam, {"eps": -1e-8}, ValueError, "eps: -1e-08; it must not be negative"),
    "eps-tensor": (Adam, {"eps": torch.tensor(1e-8)}, TypeError, "eps: a Tensor; it must be a num"),
    "eps-root": (Adam, {"eps_root": "1"}, TypeError, "eps_root: a str; it must be a number"),
    "alpha": (RMSprop, {"alpha": 1.5}, ValueError, "alpha: 1.5; it must be of [0, 1)"),
    "centered": (
        RMSprop,
        {"centered": None},
        TypeError,
        "centered: None; it must be True or False",
    ),
    **{
        f"norm-{norm}": (rule, {"max_grad_norm": norm}, ValueError, f"max_grad_norm: {norm}; it mu")
        for rule, norm in ((SGD, 0), (Adam, -1.0), (AdamW, math.inf), (RMSprop, math.nan))
    },
    "norm-string": (SGD, {"max_grad_norm": "1"}, TypeError, "max_grad_norm: a str; it must be a n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    rule, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        rule(**options)


def test_what_torch_refuses_is_refused():
    parameters = [nn.Parameter(torch.zeros(2))]
    for name, (rule, options, _, _) in REFUSED.items():
        if not name.startswith(("negative", "nesterov-alone", "nesterov-damp", "beta-", "eps")):
            continue
        if name in ("eps-root", "eps-tensor"):
            continue
        with pytest.raises((ValueError, TypeError)):
            getattr(torch.optim, rule.__name__)(parameters, 0.1, **options)


def test_the_argument_is_an_instance():
    assert inner_optimizer(None) == SGD()
    rule = Adam()
    assert inner_optimizer(rule) is rule
    with pytest.raises(
        TypeError, match=re.escape("the class Adam; it must be an instance of fastme")
    ):
        inner_optimizer(Adam)
    with pytest.raises(TypeError, match=re.escape("write Adam()")):
        inner_optimizer(Adam)
    torchs = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)
    with pytest.raises(TypeError, match="change parameters in place"):
        inner_optimizer(torchs)
    with pytest.raises(TypeError, match="inner_optimizer: a str; it must be None"):
        inner_optimizer("adam")


def test_known_rules_are_not_derived_from():
    with pytest.raises(TypeError, match="Mine: derives from Adam, whose pullback"):
        type("Mine", (Adam,), {"__module__": "mine"})


def test_rules_are_values():
    assert SGD(0.9) == SGD(0.9)
    assert SGD(0.9) != SGD(0.8)
    assert SGD() != Adam()
    assert Adam() != AdamW(weight_decay=0.0)
    assert Adam((0.9, 0.99)) == Adam([0.9, 0.99])  # type: ignore[arg-type]
    assert len({SGD(0.9), SGD(0.9), RMSprop(), RMSprop(0.9), Adam()}) == 4
    one, other = torch.tensor(0.9), torch.tensor(0.9)
    assert SGD(one) == SGD(one)
    assert SGD(one) != SGD(other)
    assert SGD(one) != SGD(0.9)
    with pytest.raises(AttributeError):
        SGD().momentum = 0.9  # type: ignore[misc]


def test_a_plan_depends_on_what_is_there_and_not_on_values():
    assert SGD(0.9).structure == SGD(0.8, weight_decay=0).structure
    assert SGD(learned(0.9)).structure == SGD(learned(0.1)).structure
    assert Adam((0.9, 0.99), max_grad_norm=1).structure == Adam(max_grad_norm=2).structure
    different: list[InnerOptimizer] = [
        SGD(), SGD(0.9), SGD(0.9, nesterov=True), SGD(0.9, weight_decay=0.1), SGD(0.9, 0.1),
        SGD(max_grad_norm=1.0), SGD(torch.tensor(0.9)), SGD(learned(0.9)),
        Adam(), AdamW(), AdamW(weight_decay=0.0), Adam((0.0, 0.99)), Adam(eps_root=1e-8),
        Adam((learned(0.9), 0.99)), Adam((0.9, learned(0.99))), RMSprop(), RMSprop(centered=True),
    ]  # fmt: skip
    assert len({rule.structure for rule in different}) == len(different)


def test_plain_descent_is_recognised():
    assert SGD().is_plain
    assert SGD(dampening=0.5).is_plain  # of a momentum that is not there
    for rule in (
        SGD(0.9),
        SGD(weight_decay=0.1),
        SGD(max_grad_norm=1.0),
        SGD(learned(0.0)),
        Adam(),
    ):
        assert not rule.is_plain


@pytest.mark.parametrize("name", ALL)
def test_kernels_are_told_every_option(name):
    rule: Any = ALL[name]()
    told = rule.kernel_rule()
    assert tuple(told.options) == KERNEL_OPTIONS
    assert all(type(value) is float for value in told.options.values())
    assert set(told.learned.values()) == set(rule.leaves())
    assert set(told.learned) <= set(KERNEL_OPTIONS)
    for option, leaf in told.learned.items():
        assert told.options[option] == rule.leaves()[leaf].item()


def test_kernels_are_told_the_options_of_each_kind():
    def told(rule: Any) -> tuple[str, dict[str, float]]:
        given = rule.kernel_rule()
        return given.kind, {option: value for option, value in given.options.items() if value}

    none = {"max_grad_norm": math.inf}
    assert told(SGD()) == ("sgd", none)
    assert told(SGD(0.9, nesterov=True, weight_decay=0.1, max_grad_norm=2)) == (
        "sgd",
        {"momentum": 0.9, "nesterov": 1.0, "weight_decay": 0.1, "max_grad_norm": 2.0},
    )
    assert told(AdamW((0.8, 0.95), eps_root=0.1)) == (
        "adam",
        {"weight_decay": 0.01, "decoupled": 1.0, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8,
         "eps_root": 0.1, **none},
    )  # fmt: skip
    assert told(RMSprop(momentum=0.5, centered=True)) == (
        "rmsprop",
        {"momentum": 0.5, "alpha": 0.99, "eps": 1e-8, "centered": 1.0, **none},
    )
    assert InnerOptimizer().kernel_rule() is None


def test_public_names():
    assert set(fastmeta.inner.__all__) == {"SGD", "Adam", "AdamW", "InnerOptimizer", "RMSprop"}
    assert "betas=(0.9, 0.999)" in repr(Adam())
