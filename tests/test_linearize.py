"""`linearize`: losses, gradients and Hessian products of each task, beside autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta

TASKS, EXAMPLES, CLASSES = 3, 5, 4


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, CLASSES))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


class Branching(nn.Module):
    """A module that no reader takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h if h.sum().item() > 0 else torch.tanh(h)


def _own(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.softmax(-1).gather(-1, target[:, None]).square().mean()


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(TASKS, EXAMPLES, 6).double(), torch.randint(CLASSES, (TASKS, EXAMPLES))


def _near(model: nn.Module) -> dict[str, Tensor]:
    """A point a task."""
    return {
        name: p.detach() + 0.1 * torch.randn(TASKS, *p.shape).double()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, _own], ids=["standard", "own"])
@pytest.mark.parametrize("make", [_mlp, _conv, Branching])
def test_it_is_that_of_autograd(make: Callable[[], nn.Module], loss_fn: Any) -> None:
    model, (x, y) = make().double(), _data()
    point = _near(model)
    at = fastmeta.linearize(model, (x, y), loss_fn=loss_fn, parameters=point)
    for _ in range(2):  # on the same pass
        vectors = {name: torch.randn_like(p) for name, p in point.items()}
        products = at.hvp(vectors)
        for task in range(TASKS):
            v = {name: vector[task] for name, vector in vectors.items()}
            own = {name: p[task].clone().requires_grad_() for name, p in point.items()}
            value = loss_fn(functional_call(model, own, (x[task],)), y[task])
            leaves = [*own.values()]
            found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            gradients = dict(zip(own, found, strict=True))
            along = sum((g * v[name]).sum() for name, g in gradients.items() if g is not None)
            curved = torch.autograd.grad(along, leaves, allow_unused=True)
            expected = dict(zip(own, curved, strict=True))
            torch.testing.assert_close(at.losses[task], value.detach())
            for name, p in own.items():
                for got, want in ((at.gradients, gradients), (products, expected)):
                    right = torch.zeros_like(p) if want[name] is None else want[name].detach()
                    torch.testing.assert_close(got[name][task], right, rtol=1e-9, atol=1e-11)


def test_by_default_at_the_models_own_parameters_which_stay() -> None:
    model, data = _mlp().double(), _data()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    at = fastmeta.linearize(model, data)
    loss = F.cross_entropy(model(data[0][1]), data[1][1])
    torch.testing.assert_close(at.losses[1], loss.detach())
    assert at.outputs.shape == (TASKS, EXAMPLES, CLASSES)
    assert not any(g.requires_grad for g in at.gradients.values())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("make", [_mlp, Branching])
def test_a_product_of_what_has_changed_since_is_refused(make: Callable[[], nn.Module]) -> None:
    model, data = make().double(), _data()
    found = fastmeta.linearize(model, data, loss_fn=F.cross_entropy)
    found.hvp(found.gradients)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="linearize again"):
        found.hvp(found.gradients)


def test_refusals() -> None:
    model, data = _mlp().double(), _data()
    at, point = fastmeta.linearize(model, data), _near(model)
    with pytest.raises(ValueError, match=r"vectors: no entry for '0\.weight'"):
        at.hvp({})
    with pytest.raises(ValueError, match="vectors: 'other' is no trainable parameter"):
        at.hvp({**point, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"vectors\['0.bias'\]: .* must be .* \[T, \.\.\.\] ="):
        at.hvp({**point, "0.bias": torch.zeros(5).double()})
    with pytest.raises(TypeError, match=r"parameters: .*it must be a dict"):
        fastmeta.linearize(model, data, parameters=[1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="loss_fn: the class MSELoss"):
        fastmeta.linearize(model, data, loss_fn=nn.MSELoss)  # pyright: ignore[reportArgumentType]
