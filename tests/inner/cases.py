"""Update rules in every combination of options, and drawn arguments of their updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner import SGD, Adam, AdamW, InnerOptimizer, RMSprop

TASKS = 3
SHAPES = {"w": (2, 4), "b": (4,), "scale": ()}
DEAD = {"w": (slice(None), slice(None), 0), "b": (slice(None), 0)}
"""Entries whose gradient is always 0."""


def learned(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


Make = Callable[[], InnerOptimizer]
RULES: dict[str, Make] = {
    "sgd": SGD,
    "sgd-decay": lambda: SGD(weight_decay=0.1),
    "sgd-momentum": lambda: SGD(0.9),
    "sgd-dampening": lambda: SGD(0.9, 0.3, weight_decay=0.1),
    "sgd-dampening-alone": lambda: SGD(dampening=0.3),
    "sgd-nesterov": lambda: SGD(0.9, nesterov=True, weight_decay=0.1),
    "adam": Adam,
    "adam-decay": lambda: Adam((0.8, 0.95), weight_decay=0.1),
    "adam-root": lambda: Adam((0.5, 0.9), eps_root=1e-3),
    "adam-no-decay-of-moments": lambda: Adam((0.0, 0.0), eps=1e-3),
    "adamw": lambda: AdamW((0.8, 0.95), weight_decay=0.1),
    "rmsprop": RMSprop,
    "rmsprop-decay": lambda: RMSprop(0.9, weight_decay=0.1),
    "rmsprop-momentum": lambda: RMSprop(0.9, momentum=0.8, weight_decay=0.1),
    "rmsprop-centered": lambda: RMSprop(0.9, centered=True),
    "rmsprop-centered-momentum": lambda: RMSprop(0.9, 1e-5, 0.1, 0.8, True),
}
LEARNED: dict[str, Make] = {
    "sgd-all": lambda: SGD(learned(0.9), learned(0.3), weight_decay=learned(0.1)),
    "sgd-nesterov": lambda: SGD(learned(0.9), nesterov=True),
    "sgd-decay-alone": lambda: SGD(weight_decay=learned(0.1)),
    "sgd-dampening-alone": lambda: SGD(dampening=learned(0.3)),
    "sgd-fixed-tensor": lambda: SGD(torch.tensor(0.9).double(), learned(0.3)),
    "adam-all": lambda: Adam((learned(0.8), learned(0.95)), weight_decay=learned(0.1)),
    "adam-first-root": lambda: Adam((learned(0.8), 0.95), eps_root=1e-3),
    "adam-second": lambda: Adam((0.8, learned(0.95))),
    "adamw-all": lambda: AdamW((learned(0.8), learned(0.95)), weight_decay=learned(0.1)),
    "rmsprop-all": lambda: RMSprop(learned(0.9), 1e-5, learned(0.1), learned(0.8), True),
    "rmsprop-alpha": lambda: RMSprop(learned(0.9)),
}
CLIPPED: dict[str, Make] = {
    # The drawn gradients have norms of about 3.5.
    "sgd-clipped": lambda: SGD(max_grad_norm=1.0),
    "sgd-some-clipped": lambda: SGD(0.9, weight_decay=0.1, max_grad_norm=3.5),
    "sgd-none-clipped": lambda: SGD(0.9, max_grad_norm=100.0),
    "adam-clipped": lambda: Adam((learned(0.8), 0.95), max_grad_norm=1.0, weight_decay=0.1),
    "adamw-some-clipped": lambda: AdamW(max_grad_norm=3.5),
    "rmsprop-clipped": lambda: RMSprop(centered=True, momentum=0.9, max_grad_norm=1.0),
}
ALL = {
    **RULES,
    **CLIPPED,
    **{f"learned-{name}": make for name, make in LEARNED.items()},
}


def drawn(generator: torch.Generator, dead: bool = False) -> dict[str, Tensor]:
    """Tensors `[T, ...]` by name; `dead` entries are 0."""
    tensors = {
        name: torch.randn(TASKS, *shape, dtype=torch.float64, generator=generator)
        for name, shape in SHAPES.items()
    }
    for name, entries in DEAD.items() if dead else ():
        tensors[name][entries] = 0.0
    return tensors


def drawn_like(tree: Any, generator: torch.Generator) -> Any:
    return pytree.tree_map(lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator), tree)


def rates(kind: str, generator: torch.Generator) -> dict[str, Any]:
    """Rates of one step by name: numbers, one a tensor, one a row, or one an entry."""
    shapes: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
        "scalar": lambda shape: (),
        "row": lambda shape: (*shape[:-1], 1) if shape else (),
        "element": lambda shape: shape,
        "task": lambda shape: (TASKS, *(1,) * len(shape)),
    }
    if kind == "number":
        return dict.fromkeys(SHAPES, 0.1)
    return {
        name: 0.05 + 0.1 * torch.rand(shapes[kind](shape), dtype=torch.float64, generator=generator)
        for name, shape in SHAPES.items()
    }
