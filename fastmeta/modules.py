"""The `nn.Module` form of a meta-step, whose learning rates can be learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import adaptation
from fastmeta.adaptation import AdaptedTasks
from fastmeta.arguments import plain_module
from fastmeta.capture import Captured
from fastmeta.inner import InnerOptimizer
from fastmeta.inner_loop import adapted_names, check_rate
from fastmeta.options import Adapt, Loss, Options, Rates
from fastmeta.plan import planner
from fastmeta.steps import MetaStep, take_step
from fastmeta.wording import a_kind

LEARNED = ("scalar", "step", "layer", "layer-step", "element")


class MAML(nn.Module):
    """A model with its inner loop: `maml(support, query)` is `maml_step` with these options.

    To outgrow one device, wrap it: `DistributedDataParallel(fastmeta.MAML(model))`; each rank takes
    its share of the tasks.

    **Arguments:** as in `maml_step`, and

    - `inner_optimizer`: parameters among its options, and of a rule that is a module, are learned.
    - `learn_inner_lr`: which learning rates become parameters, all starting from the number
        `inner_lr`: `"scalar"` (one), `"step"` (one per step), `"layer"` (one per parameter tensor),
        `"layer-step"` (one per parameter tensor and step: LSLR of MAML++, Antoniou et al. 2019),
        `"element"` (one per parameter element: Meta-SGD, Li et al. 2017). None: `inner_lr` as it
        is; an `nn.Parameter` given as `inner_lr` (or in its dict) is registered.
    - `capture`: whether a step by the CUDA kernels, or by Triton's layers, is recorded as a CUDA
        graph, for each shape of the data once, and replayed from then on. Where that can't be, a
        warning says why, once, and steps run as they do otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: Rates = 0.01,
        inner_steps: int = 1,
        inner_optimizer: InnerOptimizer | None = None,
        loss_fn: Loss = F.cross_entropy,
        query_loss_fn: Loss | None = None,
        learn_inner_lr: str | None = None,
        first_order: bool = False,
        adapt: Adapt = None,
        step_weights: Any = None,
        prox: float = 0.0,
        per_step_support: bool = False,
        memory: str = "auto",
        executor: str = "auto",
        capture: bool = False,
    ) -> None:
        super().__init__()
        self._compute = Captured().compute if capture else planner.compute
        self.model = plain_module(model)
        self.inner_steps = inner_steps
        self.inner_optimizer = inner_optimizer
        # Those of a rule that is a module are registered with it.
        leaves = (
            {}
            if isinstance(inner_optimizer, nn.Module) or inner_optimizer is None
            else (inner_optimizer.leaves())
        )
        self.inner_options = nn.ParameterDict(
            {name: leaf for name, leaf in leaves.items() if isinstance(leaf, nn.Parameter)}
        )
        self.loss_fn = loss_fn
        self.query_loss_fn = query_loss_fn
        self.first_order = first_order
        self.adapts = adapt
        self.step_weights = step_weights
        self.prox = prox
        self.per_step_support = per_step_support
        self.memory = memory
        self.executor = executor
        if learn_inner_lr is not None:
            inner_lr = self._learned(inner_lr, learn_inner_lr)
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

    def forward(
        self, support: Any, query: Any, *, task_weights: Any = None, inner_steps: int | None = None
    ) -> MetaStep:
        """`maml_step` on one batch of tasks; `inner_steps` overrides the module's own."""
        options = Options(
            inner_lr=self.inner_lr,
            inner_steps=self.inner_steps if inner_steps is None else inner_steps,
            inner_optimizer=self._update_rule(),
            loss_fn=self.loss_fn,
            query_loss_fn=self.query_loss_fn,
            first_order=self.first_order,
            adapt=self.adapts,
            step_weights=self.step_weights,
            task_weights=task_weights,
            prox=self.prox,
            per_step_support=self.per_step_support,
            memory=self.memory,
            executor=self.executor,
        )
        return take_step(self.model, support, query, options, self._compute)

    def adapt(self, support: Any, *, inner_steps: int | None = None) -> AdaptedTasks:
        """`fastmeta.adapt` with this module's options."""
        return adaptation.adapt(
            self.model,
            support,
            inner_lr=self.inner_lr,
            inner_steps=self.inner_steps if inner_steps is None else inner_steps,
            inner_optimizer=self._update_rule(),
            loss_fn=self.loss_fn,
            adapt=self.adapts,
            prox=self.prox,
            per_step_support=self.per_step_support,
            executor=self.executor,
        )

    def _update_rule(self) -> InnerOptimizer | None:
        """The update rule with its registered parameters as they are now, replaced ones too."""
        rule, registered = self.inner_optimizer, dict(self.inner_options.items())
        return rule.with_leaves(registered) if rule is not None and registered else rule

    def extra_repr(self) -> str:
        """The options that differ most from run to run."""
        return f"inner_steps={self.inner_steps}, first_order={self.first_order}"

    def _learned(self, inner_lr: Any, kind: str) -> Any:
        if kind not in LEARNED:
            raise ValueError(
                f"learn_inner_lr: {kind!r}; it must be None or one of "
                f"{', '.join(map(repr, LEARNED))}"
            )
        if isinstance(inner_lr, bool) or not isinstance(inner_lr, (int, float)):
            raise TypeError(
                f"inner_lr: {a_kind(inner_lr)}; with learn_inner_lr={kind!r} it is the "
                "number that every rate starts from"
            )
        check_rate("inner_lr", inner_lr)
        parameters = dict(self.model.named_parameters())
        names = adapted_names(parameters, self.adapts)

        def rate(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
            return nn.Parameter(
                torch.full(shape, float(inner_lr), dtype=like.dtype, device=like.device)
            )

        first = parameters[names[0]]
        if kind == "scalar":
            return rate(first, ())
        if kind == "step":
            return rate(first, (self.inner_steps,))
        shapes = {
            "layer": lambda p: (),
            "layer-step": lambda p: (self.inner_steps, *(1,) * p.dim()),
            "element": lambda p: tuple(p.shape),
        }[kind]
        return {name: rate(parameters[name], shapes(parameters[name])) for name in names}


def _key(name: str) -> str:
    """A parameter's name as `nn.ParameterDict` takes it: no dots, and no name of its methods."""
    return f"of/{name.replace('.', '/')}" if name else "of_all"
