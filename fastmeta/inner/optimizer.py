"""The protocol of an inner optimizer: `update`, and its `pullback`.

A reverse sweep asks for nothing else of a rule. A user's own rule writes `update` alone; its
pullback then comes from autograd through that one step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastmeta.inner.differentiation import vector_jacobian
from fastmeta.inner.kernel_rule import KernelRule

Tensors = dict[str, Tensor]
Rates = Mapping[str, "float | Tensor"]


@dataclass(frozen=True, eq=False)
class Pullback:
    """The cotangents that one update passes back; tensors may be shared, so read them only."""

    parameters: Tensors
    """The cotangents of `theta_k` by the update itself, `lambda'`; `[T, ...]`."""
    state: Any
    """The cotangents of `s_k`, a tree like the state."""
    gradients: Tensors
    """The cotangents of `g_k`, `gamma`: the vector of the Hessian product; `[T, ...]`."""
    anchored: Tensors
    """`gamma` as the proximal term takes it: 0 where `still`, and empty at step 0, (13)."""
    rates: Tensors
    """The gradients of the rates asked for by name, in the shape of each rate."""
    options: Tensors
    """The gradients of `leaves()`, by their names; 0 for those that are missing."""


class InnerOptimizer:
    """Base of an update rule of the inner loop; derive from it for a rule of your own.

    It has neither metaclass nor `__init__`, so that `class Mine(InnerOptimizer, nn.Module)` works;
    the parameters of such a module get meta-gradients, as do the tensors that require grad among
    the attributes of any other rule and in lists and tuples there. One that `update` reads from
    elsewhere is refused.
    """

    def init(self, parameters: Tensors) -> Any:
        """Return a task's state before its first step; by default there is none.

        **Arguments:** `parameters`: by name those that adapt, `[T, ...]`.

        **Returns** any tree (of dicts, tuples and lists) whose tensors lead with T.
        """
        return ()

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Rates, step: int
    ) -> tuple[Tensors, Any]:
        """Take one inner step; out of place, of operations that autograd can differentiate twice.

        **Arguments**

        - `gradients`, `parameters`: by name those that adapt, `[T, ...]`, the same names in both;
            the proximal term is in the gradients, which are 0 where the loss reaches nothing.
        - `state`: what `init` or the last update returned.
        - `rates`: by name this step's learning rate: a number, or a tensor that broadcasts to
            `[T, ...]`.
        - `step`: which inner step it is, from 0.

        **Returns** the next parameters, all of those given and of the same shapes, and the state.
        """
        raise NotImplementedError(f"{type(self).__name__}: it must define update")

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
        """Pass the cotangents of an update's results back to its arguments, by autograd.

        **Arguments:** those of the update; `cotangents` of the next parameters and state (at first
        `no_cotangent(state)`); `learned_rates`: the names whose rates get a gradient.
        """
        with torch.enable_grad():
            theta, g = _fresh(parameters), _fresh(gradients)
            tensors, spec = pytree.tree_flatten(state)
            moving = [i for i, each in enumerate(tensors) if _is_differentiable(each)]
            tensors = [
                each.detach().requires_grad_() if i in moving else each
                for i, each in enumerate(tensors)
            ]
            a: dict[str, Any] = {name: _detached(rate) for name, rate in rates.items()}
            a.update(_fresh({name: a[name] for name in learned_rates}))
            leaves = self.leaves()
            results = self.update(g, pytree.tree_unflatten(tensors, spec), theta, a, step)
            into = [*theta.values(), *g.values(), *(tensors[i] for i in moving)]
            into += [*(a[name] for name in learned_rates), *leaves.values()]
            found = iter(vector_jacobian(results, cotangents, into))
        of_theta = {name: next(found) for name in theta}
        of_g = {name: next(found) for name in g}
        of_state = [
            next(found) if i in moving else _no_cotangent(each) for i, each in enumerate(tensors)
        ]
        return Pullback(
            parameters=of_theta,
            state=pytree.tree_unflatten(of_state, spec),
            gradients=of_g,
            anchored=of_g if step else {},
            rates={name: next(found) for name in learned_rates},
            options={name: next(found) for name in leaves},
        )

    def pullback_init(self, parameters: Tensors, cotangent: Any) -> tuple[Tensors, Tensors]:
        """Pass the cotangent of the first state back to `parameters` and to `leaves()`.

        Names that are missing in what it returns have gradient 0.
        """
        leaves = self.leaves()
        with torch.enable_grad():
            theta = _fresh(parameters)
            state = self.init(theta)
            found = vector_jacobian(state, cotangent, [*theta.values(), *leaves.values()])
        of_theta = dict(zip(theta, found[: len(theta)], strict=True))
        return of_theta, dict(zip(leaves, found[len(theta) :], strict=True))

    def still(self, gradients: Tensors, state: Any) -> Tensors:
        """Masks by name of entries at which the proximal term has no derivative at this step.

        They have not left `theta_0`, whatever `theta_0` is near where it is: a path that leads
        through that term cuts it off there, because its two ends cancel, but only to rounding,
        where a rule divides by an epsilon. Names without such entries are missing.
        """
        return {}

    def leaves(self) -> Tensors:
        """The tensors of the rule that get meta-gradients, by name."""
        if isinstance(self, nn.Module):
            return {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in _tensors(self) if value.requires_grad}

    def with_leaves(self, leaves: Mapping[str, Tensor]) -> InnerOptimizer:
        """The same rule with other tensors in place of its leaves, for `torch.func`."""
        if isinstance(self, nn.Module):
            return _Bound(self, dict(leaves))
        other = copy.copy(self)
        for name in {name.partition("[")[0] for name in leaves}:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                value = leaves[name]
            else:
                value = type(value)(
                    leaves.get(f"{name}[{i}]", entry) for i, entry in enumerate(value)
                )
            object.__setattr__(other, name, value)
        return other

    @property
    def structure(self) -> Hashable:
        """All that a plan depends on: not the values of options."""
        return (type(self), *self.leaves())

    @property
    def is_plain(self) -> bool:
        """True for gradient descent, `theta - a g`, and no more."""
        return False

    def kernel_rule(self) -> KernelRule | None:
        """The rule as the compiled kernels take it; None for one that they do not have."""
        return None


def no_cotangent(state: Any) -> Any:
    """The cotangent of a state that nothing depends on."""
    return pytree.tree_map(_no_cotangent, state)


class _Bound(InnerOptimizer):
    """A rule that is a module, with other tensors as its parameters."""

    def __init__(self, rule: nn.Module, leaves: Tensors) -> None:
        self._methods = _Methods(rule)
        self._leaves = leaves

    def init(self, parameters: Tensors) -> Any:
        return self._call("init", parameters)

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Rates, step: int
    ) -> tuple[Tensors, Any]:
        return self._call("update", gradients, state, parameters, rates, step)

    def leaves(self) -> Tensors:
        return self._leaves

    def _call(self, *arguments: Any) -> Any:
        replaced = {f"rule.{name}": leaf for name, leaf in self._leaves.items()}
        return functional_call(self._methods, replaced, arguments)


class _Methods(nn.Module):
    """A module's methods by name, because `functional_call` calls `forward`."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, method: str, *arguments: Any) -> Any:
        function: Callable[..., Any] = getattr(self.rule, method)
        return function(*arguments)


def _tensors(rule: InnerOptimizer) -> list[tuple[str, Tensor]]:
    """The tensors among the attributes of a rule and in tuples and lists there."""
    found: list[tuple[str, Any]] = []
    for name, value in vars(rule).items():
        if isinstance(value, (tuple, list)):
            found += [(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
        else:
            found.append((name, value))
    return [(name, value) for name, value in found if isinstance(value, Tensor)]


def _fresh(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: each.detach().requires_grad_() for name, each in tensors.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _no_cotangent(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else value
