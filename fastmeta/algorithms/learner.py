"""What the modules of all algorithms share: a model with the options of its inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fastmeta import adaptation
from fastmeta.adaptation import AdaptedTasks
from fastmeta.arguments import plain_module
from fastmeta.inner import InnerOptimizer
from fastmeta.options import Adapt, Loss, Options, Rates


class Learner(nn.Module):
    """A model with its inner loop; parameters among the options are registered."""

    def __init__(
        self,
        model: nn.Module,
        inner_lr: Rates,
        inner_steps: int,
        inner_optimizer: InnerOptimizer | None,
        loss_fn: Loss,
        adapt: Adapt,
        prox: float,
        per_step_support: bool,
        executor: str,
    ) -> None:
        super().__init__()
        self.model = plain_module(model)
        self.inner_steps = inner_steps
        self.inner_optimizer = inner_optimizer
        # Those of a rule that is a module are registered with it.
        leaves = (
            {}
            if isinstance(inner_optimizer, nn.Module) or inner_optimizer is None
            else inner_optimizer.leaves()
        )
        self.inner_options = nn.ParameterDict(
            {name: leaf for name, leaf in leaves.items() if isinstance(leaf, nn.Parameter)}
        )
        self.loss_fn = loss_fn
        self.adapts = adapt
        self.prox = prox
        self.per_step_support = per_step_support
        self.executor = executor
        self._fixed_lr: dict[str, Any] = {}
        self._lr_names: dict[str, str] = {}
        self._inner_lr_by_name = isinstance(inner_lr, Mapping)
        self.inner_lrs = nn.ParameterDict()
        entries = inner_lr if isinstance(inner_lr, Mapping) else {"": inner_lr}
        for name, rate in entries.items():
            if isinstance(rate, nn.Parameter):
                key = _key(name)
                self._lr_names[key] = name
                self.inner_lrs[key] = rate
            else:
                self._fixed_lr[name] = rate

    @property
    def inner_lr(self) -> Any:
        """The learning rates in the form that `maml_step` takes."""
        rates: dict[str, Any] = dict(self._fixed_lr)
        rates.update({self._lr_names[key]: rate for key, rate in self.inner_lrs.items()})
        return rates if self._inner_lr_by_name else rates[""]

    def options(self, inner_steps: int | None = None, **others: Any) -> Options:
        """This module's options, and others beside them; `inner_steps` overrides its own."""
        options = Options(
            inner_lr=self.inner_lr,
            inner_steps=self.inner_steps if inner_steps is None else inner_steps,
            inner_optimizer=self._update_rule(),
            loss_fn=self.loss_fn,
            adapt=self.adapts,
            prox=self.prox,
            per_step_support=self.per_step_support,
            executor=self.executor,
        )
        return replace(options, **others) if others else options

    def adapt(self, support: Any, *, inner_steps: int | None = None) -> AdaptedTasks:
        """`fastmeta.adapt` with this module's options."""
        return adaptation.adapt_tasks(self.model, support, self.options(inner_steps))

    def _update_rule(self) -> InnerOptimizer | None:
        """The update rule with its registered parameters as they are now, replaced ones too."""
        rule, registered = self.inner_optimizer, dict(self.inner_options.items())
        return rule.with_leaves(registered) if rule is not None and registered else rule

    def extra_repr(self) -> str:
        """The option that differs most from run to run."""
        return f"inner_steps={self.inner_steps}"


def _key(name: str) -> str:
    """A parameter's name as `nn.ParameterDict` takes it: no dots, and no name of its methods."""
    return f"of/{name.replace('.', '/')}" if name else "of_all"
