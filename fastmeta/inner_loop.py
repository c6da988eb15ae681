"""The inner loop: what adapts, how fast, for how many steps, and what each step is worth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.inner import SGD, InnerOptimizer
from fastmeta.inner.argument import inner_optimizer
from fastmeta.options import Adapt, Options
from fastmeta.wording import a_kind

SHARED = ""
"""The key of a learning rate that every adapted parameter shares."""


@dataclass(frozen=True, eq=False)
class InnerLoop:
    """K steps `theta <- theta - a_k * g_k` on the support set, checked and normalised.

    `rates` maps `SHARED` or a parameter's name to a number or tensor; the keys in `per_step` have
    a leading K. `step_weights` are numbers, whether or not the caller's require grad.
    """

    steps: int
    adapted: tuple[str, ...]
    rates: dict[str, float | Tensor]
    per_step: frozenset[str]
    step_weights: tuple[float, ...]
    optimizer: InnerOptimizer = field(default_factory=SGD)
    """The update rule."""
    prox: float = 0.0
    first_order: bool = False
    learned_step_weights: Tensor | None = None
    shared: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", SHARED in self.rates)

    @cached_property
    def signature(self) -> Hashable:
        """All that a plan and the choice of its executor read of it."""
        learned = tuple(self.learned_rates())
        shapes = tuple(
            (rate.shape, rate.dtype) if isinstance(rate, Tensor) else None
            for rate in self.rates.values()
        )
        return (
            self.steps, self.adapted, tuple(self.rates), shapes, learned, self.per_step,
            self.step_weights, self.prox, self.first_order, self.learned_step_weights is None,
            self.optimizer.structure, tuple(self.learned_options()),
        )  # fmt: skip

    def without(self, names: frozenset[str]) -> InnerLoop:
        """The same for the parameters that adapt but these."""
        adapted = tuple(name for name in self.adapted if name not in names)
        rates = {key: rate for key, rate in self.rates.items() if key not in names}
        return replace(self, adapted=adapted, rates=rates, per_step=self.per_step - names)

    def learned_rates(self) -> dict[str, Tensor]:
        """The learning rates that ask for a gradient, by key; none where no loss reaches any."""
        learned = {
            key: rate
            for key, rate in self.rates.items()
            if isinstance(rate, Tensor) and rate.requires_grad
        }
        return learned if self._moves_counts else {}

    @cached_property
    def by_default(self) -> bool:
        """Whether the update rule is gradient descent without any option."""
        return self.optimizer == SGD()

    def learned_options(self) -> dict[str, Tensor]:
        """The update rule's tensors that ask for a gradient, by name, as `learned_rates`."""
        return self.optimizer.leaves() if not self.by_default and self._moves_counts else {}

    def rule_with(self, options: Mapping[str, Tensor]) -> InnerOptimizer:
        """The update rule with these tensors in place of its own, and the others cut off."""
        leaves = {name: each.detach() for name, each in self.optimizer.leaves().items()}
        return self.optimizer.with_leaves({**leaves, **options}) if leaves else self.optimizer

    @cached_property
    def _moves_counts(self) -> bool:
        """Whether a query loss after some step is differentiated."""
        return any(map(self.counts, range(1, self.steps + 1)))

    def fixed_rates(self) -> dict[str, float | Tensor]:
        """All learning rates, cut off from autograd."""
        return {
            key: rate.detach() if isinstance(rate, Tensor) else rate
            for key, rate in self.rates.items()
        }

    def rate(self, rates: Mapping[str, Any], name: str, step: int) -> Any:
        """The learning rate of one parameter at one step, out of `rates` (same keys)."""
        key = self.key(name)
        return rates[key][step] if key in self.per_step else rates[key]

    def key(self, name: str) -> str:
        """The key of a parameter's learning rate."""
        return SHARED if self.shared else name

    @cached_property
    def last_step_alone(self) -> bool:
        """Whether the loss is that after the last step, as it is by default."""
        return self.step_weights[-1] == 1.0 and not any(self.step_weights[:-1])

    def rates_at(self, rates: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The learning rate of each adapted parameter at one step, out of `rates` (same keys)."""
        return {name: self.rate(rates, name, step) for name in self.adapted}

    def counts(self, step: int) -> bool:
        """Whether the query loss after this many steps is differentiated.

        Where all step weights are zero the last does, so that gradients are zeros, not missing.
        """
        return self.step_weights[step] != 0.0 or (step == self.steps and not any(self.step_weights))

    def evaluates(self, step: int) -> bool:
        """Whether the query loss after this many steps is asked for."""
        return (
            step == self.steps
            or self.step_weights[step] != 0.0
            or self.learned_step_weights is not None
        )


def inner_loop(parameters: Mapping[str, nn.Parameter], options: Options) -> InnerLoop:
    """Check the options of the inner loop against the model's parameters (name to parameter).

    **Raises** `TypeError` or `ValueError` that names the argument.
    """
    steps = _steps(options.inner_steps)
    adapted = adapted_names(parameters, options.adapt)
    moving = {name: parameters[name] for name in adapted}
    rates, per_step = _rates(options.inner_lr, moving, steps)
    weights, learned = _step_weights(options.step_weights, steps)
    prox: Any = options.prox
    first_order: Any = options.first_order
    if isinstance(prox, bool) or not isinstance(prox, Real):
        raise TypeError(f"prox: {a_kind(prox)}; it must be a number")
    if not 0 <= float(prox) < float("inf"):
        raise ValueError(f"prox: {prox}; it must not be negative, and finite")
    if not isinstance(first_order, bool):
        raise TypeError(f"first_order: {first_order!r}; it must be True or False")
    optimizer = inner_optimizer(options.inner_optimizer)
    return InnerLoop(
        steps, adapted, rates, per_step, weights, optimizer, float(prox), first_order, learned
    )


def adapted_names(parameters: Mapping[str, nn.Parameter], adapt: Adapt) -> tuple[str, ...]:
    """The names of the trainable parameters that the inner loop moves."""
    trainable = [name for name, p in parameters.items() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "model: no parameter requires grad, so there is nothing to adapt; "
            "call .requires_grad_() on those that should"
        )
    if adapt is None:
        return tuple(trainable)
    if callable(adapt) and not isinstance(adapt, nn.Module):
        chosen = _chosen(adapt, {name: parameters[name] for name in trainable})
        if not chosen:
            raise ValueError("adapt: the predicate is true of no trainable parameter")
        return chosen
    if not isinstance(adapt, Iterable):
        raise TypeError(f"adapt: {a_kind(adapt)}; it must be None, names, or a predicate")
    wanted: list[Any] = [adapt] if isinstance(adapt, str) else list(adapt)
    for want in wanted:
        if not isinstance(want, str):
            raise TypeError(f"adapt: holds {a_kind(want)}; names and prefixes are strings")
        if not any(_matches(name, want) for name in parameters):
            raise ValueError(
                f"adapt: {want!r} matches no parameter; the model has {_listing(parameters)}"
            )
        if not any(_matches(name, want) for name in trainable):
            raise ValueError(
                f"adapt: {want!r} matches only frozen parameters (requires_grad=False)"
            )
    if not wanted:
        raise ValueError("adapt: empty; name at least one parameter, or pass None for all")
    return tuple(name for name in trainable if any(_matches(name, want) for want in wanted))


def _chosen(
    adapt: Callable[[str, nn.Parameter], bool], trainable: Mapping[str, nn.Parameter]
) -> tuple[str, ...]:
    try:
        return tuple(name for name, parameter in trainable.items() if adapt(name, parameter))
    except TypeError as error:
        if _takes_two(adapt):
            raise
        raise TypeError(
            f"adapt: the predicate can't be called as it is, adapt(name, parameter) ({error}); "
            "write one of two arguments, lambda name, parameter: ..."
        ) from error


def _takes_two(function: Callable[..., Any]) -> bool:
    """Return whether it can be called with two arguments, as far as Python tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # compiled, without a signature
        return True
    return True


def _matches(name: str, want: str) -> bool:
    """A parameter's own name, or a module's that holds it."""
    return name == want or name.startswith(want.rstrip(".") + ".")


def _steps(inner_steps: Any) -> int:
    if isinstance(inner_steps, bool) or not isinstance(inner_steps, Integral):
        raise TypeError(
            f"inner_steps: {inner_steps!r}; it must be an integer, the number of inner steps"
        )
    if inner_steps < 0:
        raise ValueError(f"inner_steps: {inner_steps}; it must not be negative")
    return int(inner_steps)


def _rates(
    inner_lr: Any, adapted: dict[str, nn.Parameter], steps: int
) -> tuple[dict[str, float | Tensor], frozenset[str]]:
    if not isinstance(inner_lr, Mapping):
        rate = _rate("inner_lr", inner_lr, ", or a dict of such by parameter name")
        if isinstance(rate, Tensor) and rate.dim() > 0:
            if rate.dim() > 1 or rate.shape[0] != steps:
                raise ValueError(
                    f"inner_lr: shape {list(rate.shape)}; a tensor must be 0-d or [inner_steps] = "
                    f"[{steps}]; rates for each parameter go in a dict by name"
                )
            return {SHARED: rate}, frozenset({SHARED})
        return {SHARED: rate}, frozenset()

    for name in inner_lr:
        if name not in adapted:
            raise ValueError(
                f"inner_lr: {name!r} is not a parameter that adapts; those are {_listing(adapted)}"
            )
    rates: dict[str, float | Tensor] = {}
    per_step: set[str] = set()
    for name, parameter in adapted.items():
        if name not in inner_lr:
            raise ValueError(f"inner_lr: no entry for {name!r}, which adapts")
        rate = _rate(f"inner_lr[{name!r}]", inner_lr[name])
        if isinstance(rate, Tensor) and rate.dim() > 0 and _has_steps(name, rate, parameter, steps):
            per_step.add(name)
        rates[name] = rate
    return rates, frozenset(per_step)


def _rate(label: str, rate: Any, also: str = "") -> float | Tensor:
    given = _number_or_tensor(label, rate, also)
    # A tensor's values stay unread: a GPU would be waited for, and learned ones may turn negative.
    if not isinstance(given, Tensor):
        check_rate(label, given)
    return given


def check_rate(label: str, rate: float) -> None:
    """**Raises** `ValueError` for a learning rate that is negative, infinite or NaN."""
    if not 0 <= rate < float("inf"):
        raise ValueError(f"{label}: {rate}; it must not be negative, and finite")


def _has_steps(name: str, rate: Tensor, parameter: Tensor, steps: int) -> bool:
    """Whether a learning-rate tensor has one value a step in front."""
    extra = rate.dim() - parameter.dim()
    shape = list(rate.shape)
    if extra not in (0, 1):
        raise ValueError(
            f"inner_lr[{name!r}]: shape {shape}; the parameter is {list(parameter.shape)}, so it "
            "must be 0-d, have as many dimensions (elementwise), or one more in front (per step)"
        )
    if extra == 1 and rate.shape[0] != steps:
        raise ValueError(
            f"inner_lr[{name!r}]: shape {shape}; its first dimension must be inner_steps = {steps}"
        )
    if any(r not in (1, p) for r, p in zip(shape[extra:], parameter.shape, strict=True)):
        raise ValueError(
            f"inner_lr[{name!r}]: shape {shape} does not broadcast to the parameter's "
            f"{list(parameter.shape)}"
        )
    if rate.dtype != parameter.dtype or rate.device != parameter.device:
        raise ValueError(
            f"inner_lr[{name!r}]: {rate.dtype} on {rate.device}, but the parameter is "
            f"{parameter.dtype} on {parameter.device}"
        )
    return extra == 1


def _number_or_tensor(label: str, rate: Any, also: str = "") -> float | Tensor:
    if isinstance(rate, Tensor):
        if not rate.is_floating_point():
            raise TypeError(f"{label}: a tensor of {rate.dtype}; it must be floating point")
        return rate
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"{label}: {a_kind(rate)}; it must be a number or a tensor{also}")
    return float(rate)


def _step_weights(step_weights: Any, steps: int) -> tuple[tuple[float, ...], Tensor | None]:
    if step_weights is None:
        return (0.0,) * steps + (1.0,), None
    learned = None
    if isinstance(step_weights, Tensor):
        if step_weights.dim() != 1:
            raise ValueError(
                f"step_weights: shape {list(step_weights.shape)}; it must be "
                f"[inner_steps + 1] = [{steps + 1}]"
            )
        learned = step_weights if step_weights.requires_grad else None
        values = step_weights.tolist()
    elif isinstance(step_weights, Sequence):
        return _step_weights(_stacked("step_weights", step_weights), steps)
    else:
        raise TypeError(f"step_weights: {a_kind(step_weights)}; it must be a tensor or a sequence")
    if len(values) != steps + 1:
        raise ValueError(
            f"step_weights: {len(values)} values; one is needed before the first step and one "
            f"after each, inner_steps + 1 = {steps + 1}"
        )
    return tuple(float(value) for value in values), learned


def task_weights(weights: Any, tasks: int, parameters: Mapping[str, Tensor]) -> Tensor:
    """Checks `[T]` weights of the tasks; None is their mean."""
    device = next(iter(parameters.values())).device
    # At least float32, so that a bf16 model's mean over tasks is a mean.
    dtype = torch.float32
    for parameter in parameters.values():
        if parameter.is_floating_point():
            dtype = torch.promote_types(dtype, parameter.dtype)
    if weights is None:
        # Kept, for whatever stream: a copy from the host has arrived when it is here.
        return torch.full((tasks,), 1.0 / tasks, dtype=dtype, device="cpu").to(device)
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise TypeError(f"task_weights: {a_kind(weights)}; it must be a tensor or a sequence")
        weights = _stacked("task_weights", weights).to(device, dtype)
    if weights.shape != (tasks,):
        raise ValueError(f"task_weights: shape {list(weights.shape)}; it must be [T] = [{tasks}]")
    if not weights.is_floating_point():
        raise TypeError(f"task_weights: {weights.dtype}; it must be floating point")
    if weights.device != device:
        raise ValueError(
            f"task_weights: on {weights.device}, but the model's parameters are on {device}"
        )
    return weights


def _stacked(label: str, values: Sequence[Any]) -> Tensor:
    """A sequence of numbers or 0-d tensors as one tensor, on the tape where one is."""
    entries = [_number_or_tensor(f"{label}[{i}]", value) for i, value in enumerate(values)]
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor) and entry.dim() > 0:
            raise ValueError(f"{label}[{i}]: shape {list(entry.shape)}; it must be 0-d")
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    if tensors:
        device = tensors[0].device
        return torch.stack([
            entry if isinstance(entry, Tensor) else torch.tensor(entry, device=device)
            for entry in entries
        ])  # fmt: skip
    return torch.tensor(entries, dtype=torch.float64, device="cpu")


def _listing(names: Iterable[str]) -> str:
    listed = list(names)
    shown = ", ".join(repr(name) for name in listed[:8])
    return shown + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
