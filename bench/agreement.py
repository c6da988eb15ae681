"""The forms that may be timed: their loss and meta-gradient agree with the plain loop in float64.

A float32 step must agree to what rounding explains. One thing more may happen: where a ReLU's input
is zero but for rounding, or two pixels tie in a pooling window, rounding decides which way the
gradient of that example goes. A step that is off by no more than one example's share is therefore
asked again in float64, where ties don't come up, and has to agree to float64's rounding.

Through Adam the meta-gradient is ill-conditioned: an entry whose gradient is small is divided by
it. Float32 then tells little and float64 decides, where rounding explains as many times more as
the meta-gradient moves with the parameters it starts from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench import loops
from bench.peers.peer import Result
from bench.workloads import Pair, Workload


@dataclass(frozen=True)
class Reference:
    """The float64 loss and meta-gradient, and how far rounding may take a step from them."""

    loss: float
    gradients: list[Tensor]
    roundings: float
    """The root of their number on the longest way: see `roundings`."""
    tie: float
    """Error up to which a float32 form is asked again: one example's share of the meta-gradient, or
    what rounding explains where the meta-gradient is ill-conditioned."""
    condition: float = 1.0
    """The factor by which the meta-gradient moves more than the parameters; 1 but for Adam."""

    def tolerance(self, dtype: torch.dtype) -> float:
        condition = self.condition if dtype == torch.float64 else 1.0
        return torch.finfo(dtype).eps * self.roundings * condition

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
    loss, gradients = _loop(workload, model, support, query)
    tie = 1 / (workload.tasks * min(workload.support, workload.query))
    found = Reference(loss, gradients, roundings(workload, model), tie)
    if workload.rule == "Adam":
        condition = _condition(workload, found)
        explained = condition * found.tolerance(torch.float32)
        found = replace(found, condition=condition, tie=max(tie, explained))
    return found


def _loop(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Result:
    loss = loops.backward_at_end(
        model, support, query, workload.loss_fn, workload.steps, workload.inner_lr, workload.rule
    )
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss), gradients


def _condition(workload: Workload, reference: Reference, draws: int = 3) -> float:
    """The error per relative error of the parameters: the largest of a few draws, at least 1."""
    share, worst = 1e-10, 1.0
    for seed in range(draws):
        model, support, query = workload.make(dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += share * p * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        worst = max(worst, reference.error(_loop(workload, model, support, query)) / share)
    return worst


def roundings(workload: Workload, model: nn.Module) -> float:
    """The root of the number of roundings on the longest way: random errors add up by roots.

    The depth counts products one after another: forward and backward through L layers, for K
    inner steps and the query set, and as much again on the way back through the inner loop. The
    longest sum within a product is over a layer's inputs, or over all tasks' examples in the
    gradient of a parameter.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    depth = 4 * len(weights) * (workload.steps + 1)
    examples = workload.tasks * max(workload.support, workload.query)
    positions = math.prod(workload.shape[1:])  # a convolution's weight meets every pixel
    longest = max(examples * positions, *(p[0].numel() for p in weights))
    return math.sqrt(depth * longest)
