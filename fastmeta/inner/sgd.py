"""Stochastic gradient descent with momentum, as `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastmeta.inner.optimizer import Tensors
from fastmeta.inner.options import Option, flag, is_zero, norm, option
from fastmeta.inner.rule import Pulled, State, UpdateRule


@dataclass(frozen=True, eq=False)
class SGD(UpdateRule):
    """Gradient descent with momentum, begun anew for each task (`torch.optim.SGD`).

    **Arguments**

    - `momentum`, `dampening`, `weight_decay`: numbers, not negative, or 0-d tensors; those that
        require grad get meta-gradients.
    - `nesterov`: whether to step along `g + momentum m'`; needs momentum and no dampening
        (Nesterov 1983, in the form of Sutskever et al. 2013).
    - `max_grad_norm`: the norm to which each task's gradient is clipped; None for no clipping.
    """

    momentum: Option = 0.0
    dampening: Option = 0.0
    nesterov: bool = False
    weight_decay: Option = 0.0
    max_grad_norm: float | None = None

    kind: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening", "weight_decay"):
            object.__setattr__(self, name, option(name, getattr(self, name)))
        flag("nesterov", self.nesterov)
        object.__setattr__(self, "max_grad_norm", norm("max_grad_norm", self.max_grad_norm))
        if self.nesterov and is_zero(self.momentum):
            raise ValueError("nesterov: True, but momentum is 0; give momentum=0.9, say")
        if self.nesterov and not is_zero(self.dampening):
            raise ValueError(f"nesterov: True, but dampening is {self.dampening}; it must be 0")

    @property
    def is_plain(self) -> bool:
        """True without momentum, decay and clipping."""
        return not self.slots and is_zero(self.weight_decay) and self.max_grad_norm is None

    @property
    def slots(self) -> int:
        """One where there is momentum."""
        return int(not is_zero(self.momentum))

    def direction(self, g: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """(5), or (7) with Nesterov's momentum."""
        if not state:
            return g, ()
        m = self._momentum(g, state[0], step)
        return g + self.momentum * m if self.nesterov else m, (m,)

    def pull(
        self,
        g: Tensor,
        state: State,
        step: int,
        delta: Tensor,
        sigma: State,
        learned: Collection[str],
    ) -> Pulled:
        """(6), or (8) with Nesterov's momentum."""
        if not state:
            zero = {name: g.new_zeros(()) for name in ("momentum", "dampening") if name in learned}
            return Pulled(g, delta, (), zero)
        before, first = state[0], step == 0
        m = self._momentum(g, before, step)
        n = sigma[0] + (self.momentum * delta if self.nesterov else delta)
        gamma = n if first else (1 - self.dampening) * n
        options: Tensors = {}
        if "momentum" in learned:
            product = torch.zeros_like(n) if first else n * before
            options["momentum"] = (product + delta * m if self.nesterov else product).sum()
        if "dampening" in learned:
            options["dampening"] = g.new_zeros(()) if first else -(n * g).sum()
        direction = g + self.momentum * m if self.nesterov else m
        gamma = gamma + delta if self.nesterov else gamma
        back = torch.zeros_like(n) if first else self.momentum * n
        return Pulled(direction, gamma, (back,), options)

    def kernel_options(self) -> dict[str, tuple[str, Option]]:
        """Momentum, dampening and Nesterov's flag."""
        return {
            "momentum": ("momentum", self.momentum),
            "dampening": ("dampening", self.dampening),
            "nesterov": ("nesterov", float(self.nesterov)),
        }

    def _momentum(self, g: Tensor, before: Tensor, step: int) -> Tensor:
        """The first step's is the gradient itself, undampened, as PyTorch has it."""
        return self.momentum * before + (1 - self.dampening) * g if step else g
