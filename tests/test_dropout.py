"""Dropout draws one mask per task and step, the same in the step and in its curvature."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmeta


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double()


def data(tasks: int = 4):
    pair = torch.randn(1, 5, 3).double(), torch.randint(2, (1, 5))
    return tuple(t.expand(tasks, *t.shape[1:]).contiguous() for t in pair)


def gradient(model: nn.Module, seed: int, **options) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(seed)
    fastmeta.maml_step(model, data_kept, data_kept, inner_steps=2, **options).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


data_kept = data()


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_a_seed_repeats_a_run(form: str, force_form) -> None:
    force_form(form)
    model = network()
    assert torch.equal(gradient(model, 1), gradient(model, 1))
    assert not torch.equal(gradient(model, 1), gradient(model, 2))


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_each_task_has_a_mask_of_its_own(form: str, force_form) -> None:
    force_form(form)
    out = fastmeta.maml_step(network(), data_kept, data_kept)
    assert len(set(out.task_losses.tolist())) == 4


def test_the_first_call_draws_what_a_later_one_draws() -> None:
    """Looking at the model draws nothing: a run is repeated whatever was planned before."""
    fresh, used = network(), network()
    used.load_state_dict(fresh.state_dict())
    gradient(used, 3)
    assert torch.equal(gradient(fresh, 4), gradient(used, 4))


def test_the_sweep_draws_each_mask_once(force_form) -> None:
    """The loop unrolls one tape, so its masks agree by construction; the sweep must match it."""
    model = network()
    one_task = tuple(t[:1] for t in data_kept)

    def step(form: str) -> torch.Tensor:
        force_form(form)
        model.zero_grad()
        torch.manual_seed(5)
        fastmeta.maml_step(model, one_task, one_task, inner_lr=0.5, inner_steps=1).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    # One task and one step: both draw the support mask, then the query mask.
    torch.testing.assert_close(step("sweep"), step("loop"), rtol=1e-10, atol=1e-12)


def test_the_generator_moves_on_alike_in_step_and_curvature(force_form) -> None:
    """Replaying a mask leaves the generator where the forward pass left it."""
    force_form("sweep")
    model = network()
    torch.manual_seed(6)
    with torch.no_grad():
        fastmeta.maml_step(model, data_kept, data_kept, inner_steps=3)
    after_forward = torch.get_rng_state()
    torch.manual_seed(6)
    fastmeta.maml_step(model, data_kept, data_kept, inner_steps=3)
    assert torch.equal(after_forward, torch.get_rng_state())
