"""Update rules as the fused steps take them, written out anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_RULES = ("sgd", "adam", "rmsprop")
# In the order of csrc/network.h.
_LEARNABLE = {
    "sgd": ("momentum", None),
    "adam": ("beta1", "beta2"),
    "rmsprop": ("momentum", "beta2"),
}


@dataclass(frozen=True)
class Rule:
    """An inner optimizer as the compiled steps take it: what they are made for, and its numbers."""

    description: tuple[Any, ...]
    options: list[float]


def rule(
    kind: str = "sgd", *, momentum: float | Tensor = 0.0, dampening: float = 0.0,
    nesterov: bool = False, weight_decay: float = 0.0, decoupled: bool = False,
    beta1: float | Tensor = 0.9, beta2: float | Tensor = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, centered: bool = False, max_grad_norm: float | None = None,
) -> Rule:  # fmt: skip
    """The rule of these options; `beta2` is RMSprop's alpha.

    `momentum` and the betas may be tensors without dimensions. Those that require grad are learned:
    their gradients follow those of the rates, in the order of `learned_options`.
    """
    given = {"momentum": momentum, "beta1": beta1, "beta2": beta2}
    learned = {name for name, value in given.items() if _is_learned(value)}
    number = {
        name: value.item() if isinstance(value, Tensor) else value for name, value in given.items()
    }
    description = (
        _RULES.index(kind),
        kind != "adam" and (number["momentum"] != 0 or "momentum" in learned),
        nesterov,
        weight_decay != 0,
        decoupled,
        centered,
        max_grad_norm is not None,
        [name in learned for name in _LEARNABLE[kind]],
    )
    options = [
        number["momentum"], dampening, weight_decay, number["beta1"], number["beta2"], eps,
        eps_root, 0.0 if max_grad_norm is None else max_grad_norm,
    ]  # fmt: skip
    return Rule(description, options)


def learned_options(rule: Rule) -> tuple[str, ...]:
    """The names of the options whose gradients end the packed meta-gradient, in order."""
    names = _LEARNABLE[_RULES[rule.description[0]]]
    return tuple(
        name for name, learned in zip(names, rule.description[-1], strict=True) if learned and name
    )


def _is_learned(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
