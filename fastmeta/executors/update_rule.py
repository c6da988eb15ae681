"""An inner optimizer as the compiled steps take it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastmeta.executors.base import NotSupported
from fastmeta.inner.options import is_zero
from fastmeta.inner.rule import UpdateRule
from fastmeta.inner_loop import InnerLoop

_KINDS = ("sgd", "adam", "rmsprop")
_OPTIONS = (
    "momentum", "dampening", "weight_decay", "beta1", "beta2", "eps", "eps_root", "max_grad_norm",
)  # fmt: skip
"""Kinds and options in the order of csrc/network.h; RMSprop's alpha is its `beta2`."""

_LEARNABLE = {
    "sgd": ("momentum", None),
    "adam": ("beta1", "beta2"),
    "rmsprop": ("momentum", "alpha"),
}
"""The options of each kind that get gradients, in the order of csrc/update_rules.h."""

Description = tuple[int, bool, bool, bool, bool, bool, bool, tuple[bool, bool]]
"""Kind; momentum, nesterov, decays, decoupled, centered, clips; which two options are learned."""


@dataclass(frozen=True)
class Rule:
    """An update rule by what a step is compiled for, and by its numbers."""

    description: Description
    options: tuple[float, ...]


_PLAIN = Rule((0, False, False, False, False, False, False, (False, False)), ())


def describe(inner: InnerLoop, learns: bool) -> Rule:
    """The inner optimizer, whose learned options are asked for where `learns`.

    **Raises** `NotSupported` where the compiled steps have no rule for it.
    """
    optimizer = inner.optimizer
    if inner.by_default or optimizer.is_plain:
        return _PLAIN
    if not isinstance(optimizer, UpdateRule):
        raise NotSupported(
            f"the inner optimizer is {type(optimizer).__name__}, whose rule is its own"
        )
    rule = optimizer.kernel_rule()
    learned = inner.learned_options() if learns else {}
    wanted = [option for option, leaf in rule.learned.items() if leaf in learned]
    for option in wanted:
        if option not in _LEARNABLE[rule.kind]:
            raise NotSupported(f"the inner optimizer's {option} is learned")
    first, second = _LEARNABLE[rule.kind]
    options = dict(rule.options)
    if rule.kind == "rmsprop":
        options["beta2"] = options["alpha"]
    clips = math.isfinite(options["max_grad_norm"])
    description = (
        _KINDS.index(rule.kind),
        not is_zero(getattr(optimizer, "momentum", 0.0)),
        bool(options["nesterov"]),
        not is_zero(optimizer.weight_decay),
        bool(options["decoupled"]),
        bool(options["centered"]),
        clips,
        (first in wanted, second in wanted),
    )
    return Rule(description, tuple(options[name] for name in _OPTIONS))


def option_gradients(inner: InnerLoop, packed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every learned option with its gradient, which ends the packed meta-gradient."""
    learned, optimizer = inner.learned_options(), inner.optimizer
    if not learned or not isinstance(optimizer, UpdateRule):
        return []
    rule = optimizer.kernel_rule()
    leaves = [rule.learned.get(option or "") for option in _LEARNABLE[rule.kind]]
    found = [leaf for leaf in leaves if leaf in learned]
    parts = dict(zip(found, packed[packed.numel() - len(found) :], strict=True))
    return [(leaf, parts[name].to(leaf)) for name, leaf in learned.items()]
