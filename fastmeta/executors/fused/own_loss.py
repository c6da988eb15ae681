"""A loss of the user's own as the compiled kernels take it: an expression's programs and inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.executors.base import NotSupported
from fastmeta.executors.fused import programs
from fastmeta.executors.kernel_loss import KernelLoss
from fastmeta.executors.problem import FormUnavailable, Problem
from fastmeta.network.losses.traced import CAPTURED, TARGET, TracedLoss, labels
from fastmeta.tasks import Examples

KIND = 6
"""Its number in csrc/network.h."""


@dataclass(frozen=True)
class OwnLoss(KernelLoss):
    """A traced loss on the support or the query sets."""

    traced: TracedLoss = field(kw_only=True)
    learning: frozenset[int] = field(kw_only=True)
    """The places of captured tensors that get a gradient."""
    is_query: bool = field(kw_only=True)

    @property
    def of_classes(self) -> bool:
        """False: labels are inputs like others."""
        return False

    @functools.cached_property
    def programs(self) -> programs.LossPrograms:
        """The kernels' programs; **raises** `NotSupported` where they would be too long."""
        return programs.loss(self.traced, self.learning, self.is_query)

    @functools.cached_property
    def _labels(self) -> tuple[tuple[int, int], ...]:
        return labels(self.traced)

    def check(
        self, problem: Problem, examples: Examples, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """**Raises** `NotSupported` where targets are none that its programs read."""
        self.programs  # noqa: B018 (made here, so that one that is too long is refused here)
        if problem.differentiate and any(leaf.requires_grad for leaf in _targets(examples)):
            raise NotSupported("targets require grad")
        for leaf in _targets(examples):
            if leaf.device != problem.task_weights.device:
                raise NotSupported(f"targets are on {leaf.device}")
            if leaf.is_floating_point() and leaf.dtype != dtype:
                raise NotSupported(f"targets are {leaf.dtype}, parameters {dtype}")

    def given(
        self, examples: Examples, captured: Sequence[Any], like: Tensor
    ) -> list[tuple[Tensor, int]]:
        """What its programs read, each with the distance between two tasks' data."""
        if examples.count == 1 and self.traced.assumes_many:
            raise FormUnavailable("the loss squeezes the axis of the examples")
        leaves = _targets(examples)
        for leaf, classes in self._labels:
            low, high = torch.aminmax(leaves[leaf])
            if low < 0 or high >= classes:
                raise FormUnavailable("a label is none of the classes")
        values = dict(zip((place for place, _ in self.traced.captured), captured, strict=True))
        found: list[tuple[Tensor, int]] = []
        for each in self.programs.inputs:
            kind, place = each.key
            if kind == TARGET:
                tensor = leaves[place]
                if tensor.dtype != like.dtype or not tensor.is_contiguous():
                    tensor = tensor.detach().to(like.dtype).contiguous()
                found.append((tensor, tensor.numel() // tensor.shape[0]))
                continue
            assert kind == CAPTURED
            value = values[place]
            if isinstance(value, Tensor):
                found.append((value.detach().to(like).contiguous(), 0))
            else:
                found.append((_number(float(value).hex(), like.dtype), 0))
        return found

    def learned(self, captured: Sequence[Any]) -> list[Tensor]:
        """The captured tensors that get a gradient, in the order in which the kernels give it."""
        values = dict(zip((place for place, _ in self.traced.captured), captured, strict=True))
        return [values[each.key[1]] for each in self.programs.inputs if each.learns]


@functools.lru_cache(maxsize=256)
def _number(value: str, dtype: torch.dtype) -> Tensor:
    """One element; the number is in hexadecimal, which tells 0 from -0."""
    return torch.full((1,), float.fromhex(value), dtype=dtype)


def own_loss(
    traced: TracedLoss, captured: Sequence[Any], outputs: int, differentiate: bool, is_query: bool
) -> OwnLoss:
    """A traced loss in the kernels' terms; **raises** `NotSupported`."""
    if traced.outputs != outputs:
        raise NotSupported("the loss was traced for predictions of another width")
    learning: list[int] = []
    for (place, _), value in zip(traced.captured, captured, strict=True):
        if isinstance(value, Tensor) and value.requires_grad and differentiate:
            if not value.is_leaf:
                raise NotSupported("the loss reads a tensor that was computed and requires grad")
            learning.append(place)
    return OwnLoss(KIND, 0.0, -100, traced=traced, learning=frozenset(learning), is_query=is_query)


def _targets(examples: Examples) -> list[Tensor]:
    if isinstance(examples.targets, Tensor):
        return [examples.targets]
    return [leaf for leaf in pytree.tree_leaves(examples.targets) if isinstance(leaf, Tensor)]
