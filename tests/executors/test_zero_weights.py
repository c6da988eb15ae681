"""Weights that leave nothing of the loss: zeros for gradients, as the plain loop has them."""

import pytest
import torch
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import FUSED


class Branching(nn.Module):
    """A module that no reader takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h) if bool(h.detach().abs().max() < 1e9) else h)


NETWORKS = {
    FUSED: (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    "layered-cpu": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (1, 4, 4),
    ),
    "layered-torch": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)),
        (2, 4, 4),
    ),
    "generic": (Branching, (4,)),
}


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("executor", NETWORKS)
def test_zero_step_weights_give_zero_gradients(executor: str, steps: int, memory: str) -> None:
    make, shape = NETWORKS[executor]
    model = make()
    data = torch.randn(2, 5, *shape), torch.randint(3, (2, 5))
    out = fastmeta.maml_step(
        model,
        data,
        data,
        inner_steps=steps,
        step_weights=[0.0] * (steps + 1),
        memory=memory,
    )
    assert memory == "low" or out.executor == executor
    out.loss.backward()
    assert out.loss == 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
