"""Update rules of the inner loop, written out for the peers that bring none.

Each takes parameters and gradients in the same order, the state (empty before the first step) and
the step's number from 0, and gives parameters and state after the step. All are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

MOMENTUM = 0.9
BETAS = 0.9, 0.999
EPS = 1e-8

Tensors = list[Tensor]
State = tuple[Tensors, ...]
Update = Callable[[Sequence[Tensor], Sequence[Tensor], State, int], tuple[Tensors, State]]


def update(rule: str, rate: float) -> Update:
    """The rule of that name at a rate."""
    return partial(RULES[rule], rate)


def _descent(
    rate: float, phi: Sequence[Tensor], gradients: Sequence[Tensor], state: State, step: int
) -> tuple[Tensors, State]:
    return [p.sub(g, alpha=rate) for p, g in zip(phi, gradients, strict=True)], state


def _momentum(
    rate: float, phi: Sequence[Tensor], gradients: Sequence[Tensor], state: State, step: int
) -> tuple[Tensors, State]:
    """As `torch.optim.SGD(momentum=0.9)`."""
    m = list(gradients)
    if state:
        m = [g.add(before, alpha=MOMENTUM) for g, before in zip(m, state[0], strict=True)]
    return [p.sub(each, alpha=rate) for p, each in zip(phi, m, strict=True)], (m,)


def _adam(
    rate: float, phi: Sequence[Tensor], gradients: Sequence[Tensor], state: State, step: int
) -> tuple[Tensors, State]:
    """As `torch.optim.Adam`: eps stands outside the corrected root."""
    b1, b2 = BETAS
    if state:
        m = [torch.lerp(a, g, 1 - b1) for a, g in zip(state[0], gradients, strict=True)]
        v = [(b2 * a).addcmul(g, g, value=1 - b2) for a, g in zip(state[1], gradients, strict=True)]
    else:
        m = [(1 - b1) * g for g in gradients]
        v = [(1 - b2) * g * g for g in gradients]
    c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    # c2 is taken out of the root, which spares a pass. Where a gradient has always been 0, the
    # smallest number under the root keeps its slope finite; it is lost in all others.
    tiny = torch.finfo(phi[0].dtype).tiny
    roots = [each.add(tiny).sqrt().add(EPS * c2**0.5) for each in v]
    size = -rate * c2**0.5 / c1
    moved = [p.addcdiv(a, u, value=size) for p, a, u in zip(phi, m, roots, strict=True)]
    return moved, (m, v)


RULES = {"descent": _descent, "momentum": _momentum, "Adam": _adam}
