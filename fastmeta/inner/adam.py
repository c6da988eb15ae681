"""Adam and AdamW, as `torch.optim.Adam` and `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastmeta.inner.clipping import root
from fastmeta.inner.optimizer import Tensors
from fastmeta.inner.options import Option, norm, number, option
from fastmeta.inner.rule import Pulled, State, UpdateRule
from fastmeta.wording import a_kind


class _Moments(NamedTuple):
    """The moments after a step, corrected for their bias by `c1` and `c2`."""

    m: Tensor
    v: Tensor
    c1: Any
    c2: Any
    s: Tensor
    u: Tensor
    direction: Tensor


@dataclass(frozen=True, eq=False)
class _Adam(UpdateRule):
    betas: tuple[Option, Option] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: Option = 0.0
    max_grad_norm: float | None = None

    kind: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", _pair(self.betas))
        for name in ("eps", "eps_root"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        object.__setattr__(self, "weight_decay", option("weight_decay", self.weight_decay))
        object.__setattr__(self, "max_grad_norm", norm("max_grad_norm", self.max_grad_norm))

    @property
    def slots(self) -> int:
        """Two, the moments."""
        return 2

    def direction(self, g: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """(9)."""
        after = self._moments(g, state, step)
        return after.direction, (after.m, after.v)

    def pull(
        self,
        g: Tensor,
        state: State,
        step: int,
        delta: Tensor,
        sigma: State,
        learned: Collection[str],
    ) -> Pulled:
        """(10)."""
        (b1, b2), (m, v), (nu, omega) = self.betas, state, sigma
        after = self._moments(g, state, step)
        c1, c2, s, u, d = after.c1, after.c2, after.s, after.u, after.direction
        p = nu + delta / (c1 * u)
        by_root = torch.where(s > 0, -delta * d / (2 * c2 * u * s), 0.0)
        q = omega + by_root
        gamma = (1 - b1) * p + 2 * (1 - b2) * g * q
        options: Tensors = {}
        if "betas[0]" in learned:
            slope = (step + 1) * b1**step / c1
            options["betas[0]"] = (p * (m - g)).sum() + slope * (delta * d).sum()
        if "betas[1]" in learned:
            slope = (step + 1) * b2**step / c2
            options["betas[1]"] = (q * (v - g * g)).sum() + slope * (by_root * after.v).sum()
        return Pulled(d, gamma, (b1 * p, b2 * q), options)

    def squares(self, state: State) -> tuple[Tensor, Option]:
        """The second moment."""
        return state[1], self.betas[1]

    def kernel_options(self) -> dict[str, tuple[str, Option]]:
        """The betas and both epsilons."""
        return {
            "beta1": ("betas[0]", self.betas[0]),
            "beta2": ("betas[1]", self.betas[1]),
            "eps": ("eps", self.eps),
            "eps_root": ("eps_root", self.eps_root),
        }

    def _moments(self, g: Tensor, state: State, step: int) -> _Moments:
        b1, b2 = self.betas
        m, v = b1 * state[0] + (1 - b1) * g, b2 * state[1] + (1 - b2) * g * g
        c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        s = root(v / c2 + self.eps_root)
        u = s + self.eps
        return _Moments(m, v, c1, c2, s, u, m / c1 / u)


@dataclass(frozen=True, eq=False)
class Adam(_Adam):
    """Adam (Kingma and Ba 2015), begun anew for each task (`torch.optim.Adam`).

    **Arguments**

    - `betas`: the decay of the first and of the second moment, of [0, 1); either may be a 0-d
        tensor, learned where it requires grad.
    - `eps`, `eps_root`: added to the root of the second moment, and under it (torch has no
        `eps_root`). At `eps_root=0` the meta-gradient of an entry whose gradient is exactly 0 is
        of size `inner_lr / eps`; `eps_root=1e-8`, say, keeps it small.
    - `weight_decay`: added to the gradient, times the parameter; a number or 0-d tensor.
    - `max_grad_norm`: the norm to which each task's gradient is clipped; None for no clipping.
    """


@dataclass(frozen=True, eq=False)
class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019; `torch.optim.AdamW`).

    **Arguments:** those of `Adam`; parameters shrink by `inner_lr * weight_decay` at each step.
    """

    weight_decay: Option = 0.01

    decoupled: ClassVar[bool] = True


def _pair(betas: Any) -> tuple[Option, Option]:
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas: {a_kind(betas)}; it must be a pair, such as (0.9, 0.999)")
    if len(betas) != 2:
        raise ValueError(f"betas: {len(betas)} entries; it must be a pair, such as (0.9, 0.999)")
    first, second = (option(f"betas[{i}]", each, below=1.0) for i, each in enumerate(betas))
    return first, second
