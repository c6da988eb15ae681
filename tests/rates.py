"""Inner learning rates of every form: as `maml_step` takes them, and as the oracle does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR_KINDS = ("layer", "element", "row", "layer-step", "element-step")
KINDS = ("number", "scalar", "per-step", *_TENSOR_KINDS, "mixed")


def learned(*shape: int) -> Tensor:
    """Numbers of [0.1, 0.2) that require grad, the same in float32 as in float64."""
    return (0.1 + 0.1 * torch.rand(shape)).double().requires_grad_()


def by_kind(kind: str, steps: int, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """`inner_lr` for parameters of these names and shapes."""
    if kind == "number":
        return 0.2
    if kind == "scalar":
        return learned()
    if kind == "per-step":
        return learned(steps)
    make: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
        "layer": lambda shape: learned(),
        "element": lambda shape: learned(*shape),
        "row": lambda shape: learned(*shape[:-1], 1),
        "layer-step": lambda shape: learned(steps, *(1,) * len(shape)),
        "element-step": lambda shape: learned(steps, *shape),
    }
    chosen = _of_each(kind, shapes)
    return {name: make[chosen[name]](shape) for name, shape in shapes.items()}


def reader(kind: str, inner_lr: Any) -> Callable[[str, int], Any]:
    """The rate of a parameter at a step, for the oracle."""
    if kind == "per-step":
        return lambda name, step: inner_lr[step]
    if not isinstance(inner_lr, dict):
        return lambda name, step: inner_lr
    chosen = _of_each(kind, inner_lr)
    return lambda name, step: (
        inner_lr[name][step] if chosen[name].endswith("-step") else inner_lr[name]
    )


def leaves(inner_lr: Any) -> list[Tensor]:
    """Its tensors, in the order of the parameters."""
    values = inner_lr.values() if isinstance(inner_lr, dict) else [inner_lr]
    return [value for value in values if isinstance(value, Tensor)]


def _of_each(kind: str, names: Iterable[str]) -> dict[str, str]:
    kinds = _TENSOR_KINDS if kind == "mixed" else (kind,)
    return {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
