"""The adapted parameters of a step as one, for update rules that treat all their numbers alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmeta.executors.problem import Problem
from fastmeta.inner.rule import UpdateRule

NAME = ""
"""The name under which all go; no parameter has it."""


@dataclass(frozen=True)
class Joint:
    """Parameters in rows of P numbers, `[S, P]`, in this order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each has."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    def problem(self, problem: Problem) -> Problem:
        """The same problem, in which they adapt under one name."""
        return replace(problem, inner=replace(problem.inner, adapted=(NAME,)))

    def join(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `[1, ...]` in one, the others as they are."""
        rows = torch.cat([tensors[name].flatten(1) for name in self.names], 1)
        others = {name: each for name, each in tensors.items() if name not in self.names}
        return {NAME: rows, **others}

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same by their own names, as views."""
        found = dict(tensors)
        rows = found.pop(NAME, None)
        if rows is not None:
            parts = rows.split(self.sizes, 1)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True):
                found[name] = part.unflatten(1, shape) if shape else part.squeeze(1)
        return found


def joint(problem: Problem, names: tuple[str, ...]) -> Joint | None:
    """Those of `names` that adapt in one; None where a rule or rates tell them apart."""
    inner = problem.inner
    if not inner.shared or not isinstance(inner.optimizer, UpdateRule):
        return None
    adapted, named = set(inner.adapted), problem.model.all_parameters()
    chosen = tuple(name for name in names if name in adapted)
    return Joint(chosen, tuple(tuple(named[name].shape) for name in chosen))
