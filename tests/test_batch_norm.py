"""Batch norm: the trap in torch's own transforms, and that no form falls into it."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmeta
from fastmeta.executors.generic import vmap as vmap_form


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias, -0.5, 0.5)
    return model


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def pair(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(4, count, 3).double(), torch.randint(2, (4, count))

    return pair(5), pair(6)


def _functional_errors() -> tuple[float, float]:
    """Relative errors of `vmap(grad(grad))` and of `grad(vmap(grad))` against the oracle."""
    model, (support, query) = network(), data()
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    def task(parameters, sx, sy, qx, qy):
        gradients = grad(loss)(parameters, sx, sy)
        return loss({n: p - 0.5 * gradients[n] for n, p in parameters.items()}, qx, qy)

    axes = (None, 0, 0, 0, 0)
    outside = vmap(grad(task), axes)(theta, *support, *query)
    inside = grad(lambda p: vmap(task, axes)(p, *support, *query).mean())(theta)
    reference = oracle.maml(
        model, oracle.split(support, query), list(model.parameters()), rate=lambda *_: 0.5
    )
    exact = torch.cat([g.flatten() for g in reference.gradients])

    def error(gradients: dict[str, Tensor]) -> float:
        ours = torch.cat([g.flatten() for g in gradients.values()])
        return float((ours - exact).norm() / exact.norm())

    return error({n: g.mean(0) for n, g in outside.items()}), error(inside)


def test_which_of_torchs_forms_are_right() -> None:
    """The reason for the form that `vmap` here has; a torch that mends it may say so."""
    right, wrong = _functional_errors()
    assert right < 1e-12
    if torch.__version__.startswith("2.13"):
        assert wrong > 1e-3


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_agrees_with_the_oracle(mode: str, tracked: bool, form: str, force_form) -> None:
    force_form(form)
    model, (support, query) = network(), data()
    model[1] = nn.BatchNorm1d(6, track_running_stats=tracked).double()
    model(support[0].flatten(0, 1))
    model.train(mode == "train")
    buffers = copy.deepcopy(list(model.buffers()))
    reference = oracle.maml(
        model, oracle.split(support, query), list(model.parameters()), steps=3, rate=lambda *_: 0.5
    )
    fastmeta.maml_step(model, support, query, inner_lr=0.5, inner_steps=3).loss.backward()
    for p, g in zip(model.parameters(), reference.gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-11)
    # Running statistics are not written: a step leaves the model as it was.
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)


def test_statistics_are_those_of_each_task_alone() -> None:
    model, (support, query) = network(), data()
    whole = fastmeta.maml_step(model, support, query)
    for i in range(4):
        one = fastmeta.maml_step(
            model, tuple(t[i : i + 1] for t in support), tuple(t[i : i + 1] for t in query)
        )
        torch.testing.assert_close(one.task_losses[0], whole.task_losses[i])


def test_a_wrong_form_is_caught_on_first_use(monkeypatch) -> None:
    """Should torch's `vmap(grad(grad))` ever turn wrong, the loop takes over and says why."""
    right = vmap_form.run

    def wrong(problem, chunk, body=None):
        outcome = right(problem, chunk, body)
        outcome.gradients = [(leaf, g if g is None else g * 1.1) for leaf, g in outcome.gradients]
        return outcome

    monkeypatch.setattr(vmap_form, "run", wrong)
    model = network()
    support = torch.randn(40, 5, 3).double(), torch.randint(2, (40, 5))
    text = fastmeta.explain(model, support, support, executor="generic")
    assert "form: loop, " in text
    assert "\n  not vmap: it disagrees with autograd by 1.0e-01\n" in text
