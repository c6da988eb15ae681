"""An update rule as the compiled kernels read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelRule:
    """An update rule as plain data."""

    kind: str
    """`"sgd"`, `"adam"` or `"rmsprop"`."""
    options: dict[str, float]
    """All of `KERNEL_OPTIONS`; 0 where the kind has no such option."""
    learned: dict[str, str]
    """The options that get a gradient, each with its name in `leaves()`."""


KERNEL_OPTIONS = (
    "momentum", "dampening", "nesterov", "weight_decay", "decoupled", "beta1", "beta2", "alpha",
    "eps", "eps_root", "centered", "max_grad_norm",
)  # fmt: skip
"""The options of a `KernelRule`; flags are 0 or 1, no `max_grad_norm` is infinity."""
