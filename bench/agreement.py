"""Who may be timed: a step whose loss and meta-gradient agree with the plain loop in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import loops
from bench.peers.peer import Result
from bench.workloads import Workload


@dataclass(frozen=True)
class Reference:
    """The float64 loss and meta-gradient, and how far rounding may take a step from them."""

    loss: float
    gradients: list[Tensor]
    dtype: torch.dtype
    """What the steps are checked in."""
    tolerance: float

    def error(self, result: Result) -> float:
        """The larger relative error: of the loss, or of the worst parameter's gradient.

        A gradient that is nearly zero has no relative error of its own: none is measured against
        less than a hundredth of the whole meta-gradient.
        """
        loss, gradients = result
        if [g.shape for g in gradients] != [g.shape for g in self.gradients]:
            return math.inf
        whole = torch.cat([g.flatten() for g in self.gradients]).norm()
        errors = [abs(loss - self.loss) / abs(self.loss)] + [
            float((found.double() - true).norm() / torch.maximum(true.norm(), whole / 100))
            for found, true in zip(gradients, self.gradients, strict=True)
        ]
        # NaN compares false with everything: it must not pass for small.
        return max(math.inf if math.isnan(error) else error for error in errors)


def reference(workload: Workload) -> Reference:
    model, support, query = workload.make(dtype=torch.float64)
    loss = loops.backward_at_end(
        model, support, query, workload.loss_fn, workload.steps, workload.inner_lr
    )
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    dtype = checked_in(model)
    return Reference(float(loss), gradients, dtype, tolerance(workload, model, dtype))


def checked_in(model: nn.Module) -> torch.dtype:
    """Float32, which is what is timed; float64 for convolutional networks.

    There a tie in a pooling window, or a ReLU at zero, that rounding resolves the other way moves
    a float32 meta-gradient by up to 1e-2, in every library alike.
    """
    convolutional = any(p.ndim > 2 for p in model.parameters())
    return torch.float64 if convolutional else torch.float32


def tolerance(workload: Workload, model: nn.Module, dtype: torch.dtype) -> float:
    """Rounding error to expect at most: eps, times the root of all roundings on the longest way.

    Random errors add up by the root of their number. The depth counts products one after another:
    forward and backward through L layers, for K inner steps and the query set, and as much again
    on the way back through the inner loop. The longest sum within a product is over a layer's
    inputs, or over all tasks' examples in the gradient of a parameter.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    depth = 4 * len(weights) * (workload.steps + 1)
    examples = workload.tasks * max(workload.support, workload.query)
    positions = math.prod(workload.shape[1:])  # a convolution's weight meets every pixel
    longest = max(examples * positions, *(p[0].numel() for p in weights))
    return torch.finfo(dtype).eps * math.sqrt(depth * longest)
