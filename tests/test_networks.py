"""Every kind of network, by every form of the general path, against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from networks import CASES, Case

import fastmeta

STEPS, RATE = 2, 0.05
PAIRS = [
    pytest.param(case, form, id=f"{case.name}-{form}") for case in CASES for form in case.forms
]


def _relative_errors(model, out, case, support, query) -> tuple[float, float]:
    """Errors of loss and whole meta-gradient relative to the oracle's own size."""
    twin = _double(model)
    to64 = lambda pair: tuple(_tree64(part) for part in pair)  # noqa: E731
    reference = oracle.maml(
        twin,
        oracle.split(to64(support), to64(query)),
        [p for p in twin.parameters() if p.requires_grad],
        steps=STEPS,
        rate=lambda name, step: RATE,
        loss_fn=case.loss(),
    )
    error = scale = 0.0
    for p, g in zip(
        (p for p in model.parameters() if p.requires_grad), reference.gradients, strict=True
    ):
        assert (p.grad is None) == (g is None)
        if g is not None:
            error += float((p.grad.double() - g).square().sum())
            scale += float(g.square().sum())
    loss_error = abs(float(out.loss.detach().double() - reference.loss)) / float(reference.loss)
    return loss_error, (error / scale) ** 0.5


def _tree64(tree):
    if isinstance(tree, dict):
        return {key: _tree64(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_tree64(value) for value in tree)
    return tree.double() if tree.is_floating_point() else tree


def _double(model):
    import copy

    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    return twin


def _step(case: Case, form: str, force_form, dtype: torch.dtype):
    model = case.make().to(dtype)
    support, query = case.data(3, 4, dtype), case.data(3, 5, dtype)
    force_form(form)
    out = fastmeta.maml_step(
        model, support, query, inner_lr=RATE, inner_steps=STEPS, loss_fn=case.loss()
    )
    out.loss.backward()
    return model, out, support, query


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_float64_agrees_to_1e9(case: Case, form: str, force_form) -> None:
    model, out, support, query = _step(case, form, force_form, torch.float64)
    loss_error, gradient_error = _relative_errors(model, out, case, support, query)
    assert loss_error < 1e-12
    assert gradient_error < 1e-9


@pytest.mark.parametrize(("case", "form"), PAIRS)
def test_float32_agrees_to_rounding(case: Case, form: str, force_form) -> None:
    model, out, support, query = _step(case, form, force_form, torch.float32)
    loss_error, gradient_error = _relative_errors(model, out, case, support, query)
    # Three passes a step and one at the end, each up to ten operators deep, every operator
    # rounding sums of up to a few hundred terms: 2^5 roundings to lose at each.
    depth = (3 * STEPS + 1) * 10
    assert loss_error < depth * 2**5 * torch.finfo(torch.float32).eps
    assert gradient_error < depth * 2**5 * torch.finfo(torch.float32).eps


def test_enough_kinds_of_network() -> None:
    assert len({case.name for case in CASES}) >= 25


def test_control_flow_falls_back_to_the_loop() -> None:
    case = next(case for case in CASES if case.name == "branching")
    model, data = case.make(), (case.data(40, 4, torch.float32), case.data(40, 5, torch.float32))
    text = fastmeta.explain(model, *data)
    assert "form: loop, " in text
    assert "\n  not vmap: " in text


class Averaging(torch.nn.Module):
    """Binds its buffer anew on every pass, as moving averages are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return self.layer(x - self.average)


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_a_buffer_bound_anew_stays_as_it_was(form: str, force_form) -> None:
    force_form(form)
    model, support = Averaging(), (torch.randn(3, 4, 5), torch.randint(3, (3, 4)))
    buffer = model.average
    fastmeta.maml_step(model, support, support, inner_steps=2)
    assert model.average is buffer
    assert torch.equal(buffer, torch.zeros(5))
