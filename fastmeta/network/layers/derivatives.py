"""Derivatives of a function of tensors, by functorch under `vmap` or by autograd's tape.

With g the gradients of `<gy, f(z)>`: `pull` gives g, `push` the derivative of f along r, and
`pull_tangent` that of g along r, with gy moving along rgy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[..., Tensor]


class Derivatives(Protocol):
    """One way to differentiate."""

    def pull(self, f: Function, z: Sequence[Tensor], gy: Tensor) -> tuple[Tensor, ...]: ...

    def push(self, f: Function, z: Sequence[Tensor], r: Sequence[Tensor]) -> Tensor: ...

    def pull_tangent(
        self, f: Function, z: Sequence[Tensor], wanted: Sequence[int], moving: Sequence[int],
        r: Sequence[Tensor], gy: Tensor, rgy: Tensor,
    ) -> tuple[Tensor, ...]: ...  # fmt: skip


class UnderVmap:
    """By functorch: `vmap` of it is exact, where autograd over `vmap` is not (batch norm)."""

    def pull(self, f: Function, z: Sequence[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `<gy, f(z)>`."""
        return torch.func.vjp(f, *z)[1](gy)

    def push(self, f: Function, z: Sequence[Tensor], r: Sequence[Tensor]) -> Tensor:
        """The derivative of f along r: its gradients are linear in gy, and this their transpose."""
        y, back = torch.func.vjp(f, *z)[:2]
        (along,) = torch.func.vjp(back, torch.zeros_like(y))[1](tuple(r))
        return along

    def pull_tangent(
        self, f: Function, z: Sequence[Tensor], wanted: Sequence[int], moving: Sequence[int],
        r: Sequence[Tensor], gy: Tensor, rgy: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The derivative of the gradients of `z[wanted]` along that of `z[moving]`."""

        def total(*leaves: Tensor) -> Tensor:
            at = _put(z, wanted, leaves)
            y, back = torch.func.vjp(
                lambda *there: f(*_put(at, moving, there)), *(at[i] for i in moving)
            )[:2]
            return (y * rgy).sum() + _dot(back(gy), r)

        places = tuple(range(len(wanted)))
        return torch.func.grad(total, places)(*(z[i] for i in wanted))


class OnTape:
    """By autograd, on tensors as they are."""

    def pull(self, f: Function, z: Sequence[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `<gy, f(z)>`."""
        with torch.enable_grad():
            leaves = _leaves(z)
            return _gradients(f(*leaves), leaves, gy)

    def push(self, f: Function, z: Sequence[Tensor], r: Sequence[Tensor]) -> Tensor:
        """The derivative of f along r: its gradients are linear in gy, and this their transpose."""
        with torch.enable_grad():
            leaves = _leaves(z)
            y = f(*leaves)
            u = torch.zeros_like(y).requires_grad_()
            found = _gradients(y, leaves, u, create_graph=True)
            (along,) = _gradients(_dot(found, r), [u])
            return along

    def pull_tangent(
        self, f: Function, z: Sequence[Tensor], wanted: Sequence[int], moving: Sequence[int],
        r: Sequence[Tensor], gy: Tensor, rgy: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The derivative of the gradients of `z[wanted]` along that of `z[moving]`."""
        with torch.enable_grad():
            leaves = _leaves(z)
            y = f(*leaves)
            found = _gradients(y, [leaves[i] for i in moving], gy, create_graph=True)
            return _gradients((y * rgy).sum() + _dot(found, r), [leaves[i] for i in wanted])


UNDER_VMAP, ON_TAPE = UnderVmap(), OnTape()


def _leaves(z: Sequence[Tensor]) -> list[Tensor]:
    return [each.detach().requires_grad_() for each in z]


def _gradients(
    y: Tensor, leaves: Sequence[Tensor], gy: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients of y, or of `<gy, y>`; zeros where it does not depend on a leaf."""
    if not y.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    options: Any = {"create_graph": create_graph, "materialize_grads": True}
    return torch.autograd.grad(y, leaves, gy, **options)


def _put(z: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    there = [*z]
    for place, value in zip(places, values, strict=True):
        there[place] = value
    return there


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    first, *rest = ((a * b).sum() for a, b in zip(left, right, strict=True))
    for each in rest:
        first = first + each
    return first
