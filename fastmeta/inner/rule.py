"""Common ground of the known update rules: clipping, weight decay and the descent itself.

A rule adds two functions of one tensor: `direction`, and `pull`, its pullback. The gradient comes
to it clipped and, where decay is coupled, decayed; numbers in comments are those of
docs/inner_optimizers.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.inner.clipping import Clipping
from fastmeta.inner.kernel_rule import KERNEL_OPTIONS, KernelRule
from fastmeta.inner.optimizer import InnerOptimizer, Pullback, Rates, Tensors
from fastmeta.inner.options import Option, as_number, is_zero

State = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Pulled:
    """The results of `pull` for one tensor."""

    direction: Tensor
    gradient: Tensor
    """The cotangent of the gradient that the rule saw."""
    state: State
    """The cotangents of the state before."""
    options: Tensors
    """The gradients of learned options, each 0-d."""


class UpdateRule(InnerOptimizer):
    """`theta' = theta - a d(g, s)`, elementwise; with decoupled decay `(1 - a wd) theta - a d`."""

    kind: ClassVar[str]
    decoupled: ClassVar[bool] = False
    weight_decay: Option
    max_grad_norm: float | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__module__.startswith("fastmeta.inner."):
            raise TypeError(
                f"{cls.__name__}: derives from {cls.__bases__[0].__name__}, whose pullback is that "
                "of its own update; derive from fastmeta.inner.InnerOptimizer"
            )

    @property
    def slots(self) -> int:
        """The number of state tensors of each parameter."""
        raise NotImplementedError

    def direction(self, g: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        """The direction `d` of a step along the gradient `g`, and the next state."""
        raise NotImplementedError

    def pull(
        self,
        g: Tensor,
        state: State,
        step: int,
        delta: Tensor,
        sigma: State,
        learned: Collection[str],
    ) -> Pulled:
        """The pullback of `direction`: `delta`, `sigma` are the cotangents of what it returns."""
        raise NotImplementedError

    def squares(self, state: State) -> tuple[Tensor, Option] | None:
        """The mean square of the gradients so far and its decay; None where nothing needs one."""
        return None

    def kernel_options(self) -> dict[str, tuple[str, Option]]:
        """The rule's own options by their names in kernels: name in `leaves()`, and value."""
        raise NotImplementedError

    def init(self, parameters: Tensors) -> dict[str, State]:
        """Zeros by name, which take no memory before the first step."""
        slots = self.slots
        if not slots:
            return dict.fromkeys(parameters, ())
        return {name: (p.new_zeros(()).expand_as(p),) * slots for name, p in parameters.items()}

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Rates, step: int
    ) -> tuple[Tensors, Any]:
        """Take one inner step of all tasks."""
        if self.max_grad_norm is not None:
            gradients = Clipping(gradients, self.max_grad_norm).clipped()  # (2)
        moved: Tensors = {}
        states: dict[str, State] = {}
        for name, theta in parameters.items():
            a = rates[name]
            d, states[name] = self.direction(self._seen(gradients[name], theta), state[name], step)
            if self.decoupled and not is_zero(self.weight_decay):
                theta = theta * (1 - a * self.weight_decay)  # (4)
            moved[name] = theta - a * d  # (1)
        return moved, states

    @torch.no_grad()
    def pullback(
        self,
        gradients: Tensors,
        state: Any,
        parameters: Tensors,
        rates: Rates,
        step: int,
        cotangents: tuple[Tensors, Any],
        learned_rates: Collection[str] = (),
    ) -> Pullback:
        """Pass cotangents back through an update, in closed form."""
        decay, learned = self.weight_decay, self.leaves()
        clipping, clipped = None, gradients
        if self.max_grad_norm is not None:
            clipping = Clipping(gradients, self.max_grad_norm)
            clipped = clipping.clipped()
        found = Pullback({}, {}, {}, {}, {}, {})
        for name, theta in parameters.items():
            lambda_, a = cotangents[0][name], rates[name]
            delta = -a * lambda_
            g = self._seen(clipped[name], theta)
            pulled = self.pull(g, state[name], step, delta, cotangents[1][name], learned)
            along, through = pulled.direction, pulled.gradient
            if not is_zero(decay):
                through = delta if self.decoupled else through
                lambda_ = lambda_ + decay * through  # (3), (4)
                if self.decoupled:
                    along = along + decay * theta
            if name in learned_rates:
                found.rates[name] = _as(-cotangents[0][name] * along, a)
            options = pulled.options
            if "weight_decay" in learned:
                options = {**options, "weight_decay": (through * theta).sum()}
            for option, part in options.items():
                part = part.to(learned[option])
                there = found.options.get(option)
                found.options[option] = part if there is None else there + part
            found.parameters[name] = lambda_
            found.state[name] = pulled.state
            found.gradients[name] = pulled.gradient
        if clipping is not None:
            found.gradients.update(clipping.pullback(found.gradients))
        if step:  # (13)
            found.anchored.update(found.gradients)
            for name, still in self.still(gradients, state).items():
                found.anchored[name] = torch.where(still, 0.0, found.gradients[name])
        return found

    def still(self, gradients: Tensors, state: Any) -> Tensors:
        """Entries whose gradient has been exactly 0 so far, where a step divides by its root.

        With decay none: where an entry goes then depends on where it starts, also at 0.
        """
        if not is_zero(self.weight_decay):
            return {}
        found: Tensors = {}
        for name, g in gradients.items():
            squares = self.squares(state[name])
            if squares is not None:
                v, kept = squares
                found[name] = (g == 0) & (v == 0) & (kept != 0)  # with 0 it forgets the past
        return found

    def pullback_init(self, parameters: Tensors, cotangent: Any) -> tuple[Tensors, Tensors]:
        """Nothing: the first state is 0."""
        return {}, {}

    def kernel_rule(self) -> KernelRule:
        """The rule as plain data; reads the values of tensors among its options."""
        given = {"weight_decay": ("weight_decay", self.weight_decay), **self.kernel_options()}
        options = dict.fromkeys(KERNEL_OPTIONS, 0.0)
        options |= {option: as_number(value) for option, (_, value) in given.items()}
        options["decoupled"] = float(self.decoupled)
        options["max_grad_norm"] = math.inf if self.max_grad_norm is None else self.max_grad_norm
        names, leaves = {option: leaf for option, (leaf, _) in given.items()}, self.leaves()
        learned = {option: leaf for option, leaf in names.items() if leaf in leaves}
        return KernelRule(self.kind, options, learned)

    @property
    def structure(self) -> Hashable:
        """The class, and which options are 0, None or tensors."""
        return (type(self), *map(_structure, self._options()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateRule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> Hashable:
        """Options by value; tensors by identity, in a tuple, which equals no value."""
        values = ((id(v),) if isinstance(v, Tensor) else v for v in self._options())
        return (type(self), *values)

    def _options(self) -> list[Any]:
        found: list[Any] = []
        for value in vars(self).values():
            found += value if isinstance(value, tuple) else [value]
        return found

    def _seen(self, g: Tensor, theta: Tensor) -> Tensor:
        """The gradient that the rule sees, after clipping."""
        if self.decoupled or is_zero(self.weight_decay):
            return g
        return g + self.weight_decay * theta  # (3)


def _structure(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return ("tensor", value.requires_grad, value.dtype, value.device)
    return value if value is None or isinstance(value, bool) else value != 0


def _as(product: Tensor, rate: Any) -> Tensor:
    """A gradient `[T, ...]` summed to the shape of its rate."""
    return (product.sum_to_size(rate.shape) if rate.dim() else product.sum()).to(rate)
