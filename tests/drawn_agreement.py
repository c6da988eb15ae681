"""A drawn step beside the oracle: what is compared, how, and where no comparison is fair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import drawn_steps
import oracle
import torch
from drawn_steps import Case, Drawn
from torch import Tensor, nn


class Corners:
    """How near the reference comes to one of its corners, where rounding decides about a slope."""

    def __init__(self) -> None:
        self.nearest = float("inf")

    def see(self, distance: Tensor) -> None:
        # At zero itself, as after a unit that is off, every precision says the same.
        distance = distance.detach().abs()
        distance = distance[distance > 0]
        if distance.numel():
            self.nearest = min(self.nearest, float(distance.min()))

    def watch(self, model: nn.Sequential) -> None:
        for module in model:
            if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.ELU):
                module.register_forward_pre_hook(lambda _, z: self.see(z[0]))
            elif isinstance(module, nn.Softplus):
                corner = module.threshold / module.beta
                module.register_forward_pre_hook(lambda _, z, at=corner: self.see(z[0] - at))

    def watched(self, case: Case) -> Callable[[Any, Any], Tensor]:
        loss_fn = drawn_steps.loss_function(case)
        knee = {"huber": case.loss_option or 1.0, "smooth_l1": case.loss_option or 1.0, "l1": 0.0}

        def watching(prediction: Tensor, target: Tensor) -> Tensor:
            if case.loss in knee:
                self.see((prediction - target).abs() - knee[case.loss])
            return loss_fn(prediction, target)

        return watching


def compared(drawn: Drawn, out: Any, gradients: Any) -> dict[str, Tensor]:
    """Of a reference or a `MetaStep`: losses, outputs and gradients, each in one row of numbers."""
    if isinstance(out, oracle.Reference):
        support = [torch.stack(losses) for losses in out.support_losses if losses]
        outputs = out.query_outputs
    else:
        support, outputs = [*out.support_losses.T], [*out.query_outputs]
    own = sum(p.requires_grad for p in drawn.model.parameters())
    rows = {
        "loss": [out.loss],
        "task losses": [out.task_losses],
        "support losses": support,
        "query outputs": outputs,
        "parameters": gradients[:own],
        "rates and weights": gradients[own:],
    }
    return {name: flat(tensors) for name, tensors in rows.items()}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors] or [torch.zeros(0)])


def filled(gradients: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| over |b|."""
    distances: dict[str, float] = {}
    for name, value in a.items():
        assert value.shape == b[name].shape, name
        distances[name] = float((value - b[name]).norm() / b[name].norm().clamp(min=1e-2))
    return distances
