"""RMSprop, as `torch.optim.RMSprop`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastmeta.inner.clipping import root
from fastmeta.inner.optimizer import Tensors
from fastmeta.inner.options import Option, flag, is_zero, norm, number, option
from fastmeta.inner.rule import Pulled, State, UpdateRule


@dataclass(frozen=True, eq=False)
class RMSprop(UpdateRule):
    """RMSprop (Hinton 2012; centered: Graves 2013), begun anew for each task.

    The numbers are those of `torch.optim.RMSprop`.

    **Arguments**

    - `alpha`: the decay of the mean square, of [0, 1); a number or 0-d tensor.
    - `eps`: added to its root.
    - `weight_decay`, `momentum`: numbers, not negative, or 0-d tensors. Tensors among the options
        that require grad get meta-gradients.
    - `centered`: whether the square of the mean gradient is taken off the mean square.
    - `max_grad_norm`: the norm to which each task's gradient is clipped; None for no clipping.
    """

    alpha: Option = 0.99
    eps: float = 1e-8
    weight_decay: Option = 0.0
    momentum: Option = 0.0
    centered: bool = False
    max_grad_norm: float | None = None

    kind: ClassVar[str] = "rmsprop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", option("alpha", self.alpha, below=1.0))
        object.__setattr__(self, "eps", number("eps", self.eps))
        for name in ("weight_decay", "momentum"):
            object.__setattr__(self, name, option(name, getattr(self, name)))
        flag("centered", self.centered)
        object.__setattr__(self, "max_grad_norm", norm("max_grad_norm", self.max_grad_norm))

    @property
    def slots(self) -> int:
        """The mean square; the mean where centered; the momentum where there is any."""
        return 1 + int(self.centered) + int(self._has_momentum)

    def direction(self, g: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """(11)."""
        means, s = self._means(g, state)
        r = g / (s + self.eps)
        if not self._has_momentum:
            return r, means
        m = self.momentum * state[-1] + r
        return m, (*means, m)

    def pull(
        self,
        g: Tensor,
        state: State,
        step: int,
        delta: Tensor,
        sigma: State,
        learned: Collection[str],
    ) -> Pulled:
        """(12)."""
        means, s = self._means(g, state)
        u = s + self.eps
        r = g / u
        options: Tensors = {}
        direction, rho = r, delta
        back: State = ()
        if self._has_momentum:
            direction, rho = self.momentum * state[-1] + r, sigma[-1] + delta
            back = (self.momentum * rho,)
            if "momentum" in learned:
                options["momentum"] = (rho * state[-1]).sum()
        xi = torch.where(s > 0, -rho * r / (2 * u * s), 0.0)
        q = sigma[0] + xi
        gamma = rho / u + 2 * (1 - self.alpha) * g * q
        by_alpha = q * (state[0] - g * g)
        if self.centered:
            b = sigma[1] - 2 * means[1] * xi
            gamma = gamma + (1 - self.alpha) * b
            by_alpha = by_alpha + b * (state[1] - g)
            back = (self.alpha * b, *back)
        if "alpha" in learned:
            options["alpha"] = by_alpha.sum()
        return Pulled(direction, gamma, (self.alpha * q, *back), options)

    def squares(self, state: State) -> tuple[Tensor, Option]:
        """The mean square."""
        return state[0], self.alpha

    def kernel_options(self) -> dict[str, tuple[str, Option]]:
        """Alpha, epsilon, momentum, and the flag of centering."""
        return {
            "alpha": ("alpha", self.alpha),
            "eps": ("eps", self.eps),
            "momentum": ("momentum", self.momentum),
            "centered": ("centered", float(self.centered)),
        }

    @property
    def _has_momentum(self) -> bool:
        return not is_zero(self.momentum)

    def _means(self, g: Tensor, state: State) -> tuple[State, Tensor]:
        """The mean square after a step (and the mean), and the root of what is left of it.

        Rounding can leave less than nothing of it, where PyTorch's root is NaN and this one 0.
        """
        v = self.alpha * state[0] + (1 - self.alpha) * g * g
        if not self.centered:
            return (v,), root(v)
        mean = self.alpha * state[1] + (1 - self.alpha) * g
        return (v, mean), root(v - mean * mean)
