"""An update rule for the tensors of a single task, as autograd and `vmap` see them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner.optimizer import InnerOptimizer, Pullback, Rates, Tensors


def one_task(rule: InnerOptimizer) -> InnerOptimizer:
    """The rule for the tensors of a single task, without the leading T."""
    return _OneTask(rule)


class _OneTask(InnerOptimizer):
    def __init__(self, rule: InnerOptimizer) -> None:
        self._rule = rule

    def init(self, parameters: Tensors) -> Any:
        return _alone(self._rule.init(_as_tasks(parameters)))

    def update(
        self, gradients: Tensors, state: Any, parameters: Tensors, rates: Rates, step: int
    ) -> tuple[Tensors, Any]:
        g, s, theta = map(_as_tasks, (gradients, state, parameters))
        return _alone(self._rule.update(g, s, theta, rates, step))

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
        g, s, theta = map(_as_tasks, (gradients, state, parameters))
        cotangents = _as_tasks(cotangents)
        found = self._rule.pullback(g, s, theta, rates, step, cotangents, learned_rates)
        return Pullback(
            parameters=_alone(found.parameters),
            state=_alone(found.state),
            gradients=_alone(found.gradients),
            anchored=_alone(found.anchored),
            rates=found.rates,
            options=found.options,
        )

    def pullback_init(self, parameters: Tensors, cotangent: Any) -> tuple[Tensors, Tensors]:
        of_theta, options = self._rule.pullback_init(_as_tasks(parameters), _as_tasks(cotangent))
        return _alone(of_theta), options

    def still(self, gradients: Tensors, state: Any) -> Tensors:
        return _alone(self._rule.still(_as_tasks(gradients), _as_tasks(state)))

    def leaves(self) -> Tensors:
        return self._rule.leaves()

    def with_leaves(self, leaves: Mapping[str, Tensor]) -> InnerOptimizer:
        return _OneTask(self._rule.with_leaves(leaves))


def _as_tasks(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, tree)


def _alone(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.squeeze(0) if isinstance(x, Tensor) else x, tree)
