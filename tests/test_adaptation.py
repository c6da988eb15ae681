"""`adapt`: the inner loop's parameters, as a batched function and as modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

TASKS, STEPS, RATE, PROX = 4, 3, 0.1, 0.5
OPTIONS = {"inner_steps": STEPS, "inner_lr": RATE}
FORMS = pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
# Three passes a step and one at the end, up to ten operators deep, 2^3 roundings to lose at each.
ROUNDING = (3 * STEPS + 1) * 10 * 2**3 * torch.finfo(torch.float64).eps
CLOSE = {"rtol": ROUNDING, "atol": ROUNDING}


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _batch_norm() -> nn.Module:
    """In `train()`, its statistics not at their start."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model(torch.randn(8, 3, dtype=torch.float64))
    return model


MODELS = pytest.mark.parametrize("make", [_plain, _batch_norm])


def _pairs(*counts: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(count, 3, dtype=torch.float64), torch.randint(2, (count,))) for count in counts
    ]


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*pairs, strict=True)
    return torch.stack(x), torch.stack(y)


def _inner_loop(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    adapted: Callable[[str], bool] = lambda name: True,
    prox: float = 0.0,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """phi_K and the support losses by plain autograd."""
    theta = dict(model.named_parameters())
    phi, losses = dict(theta), []
    names = [name for name in theta if adapted(name)]
    for _ in range(STEPS):
        loss = F.cross_entropy(oracle.call(model, phi, x), y)
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, [phi[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            pull = prox * (phi[name] - theta[name])
            phi[name] = (phi[name] - RATE * (gradient + pull)).detach().requires_grad_()
    return {name: p.detach() for name, p in phi.items()}, losses


@MODELS
@FORMS
def test_parameters_and_losses_are_those_of_the_inner_loop(
    make: Callable[[], nn.Module], form: str, force_form
) -> None:
    force_form(form)
    model, support = make(), _pairs(*[5] * TASKS)
    tasks = fastmeta.adapt(model, _stacked(support), **OPTIONS)
    assert tasks.support_losses.shape == (STEPS, TASKS)
    for i, (x, y) in enumerate(support):
        phi, losses = _inner_loop(model, x, y)
        assert list(tasks.parameters) == list(phi)
        for name, value in phi.items():
            torch.testing.assert_close(tasks.parameters[name][i], value, **CLOSE)
        torch.testing.assert_close(tasks.support_losses[:, i], torch.stack(losses), **CLOSE)


@MODELS
@FORMS
def test_predictions_are_those_of_the_adapted_parameters(
    make: Callable[[], nn.Module], form: str, force_form
) -> None:
    force_form(form)
    model, support = make(), _pairs(*[5] * TASKS)
    query = torch.randn(TASKS, 6, 3, dtype=torch.float64)
    tasks = fastmeta.adapt(model, _stacked(support), **OPTIONS)
    together, listed = tasks(query), tasks(list(query))
    assert together.shape == (TASKS, 6, 2)
    assert not together.requires_grad
    for i, (x, y) in enumerate(support):
        expected = oracle.call(model, _inner_loop(model, x, y)[0], query[i]).detach()
        torch.testing.assert_close(together[i], expected, **CLOSE)
        torch.testing.assert_close(listed[i], expected, **CLOSE)
        torch.testing.assert_close(tasks[i](query[i]).detach(), expected, **CLOSE)


def test_a_subset_adapts_and_the_rest_stays() -> None:
    model, support = _plain(), _pairs(*[5] * TASKS)
    tasks = fastmeta.adapt(model, _stacked(support), adapt="2", **OPTIONS)
    assert list(tasks.parameters) == ["2.weight", "2.bias"]
    for module, (x, y) in zip(tasks, support, strict=True):
        phi, _ = _inner_loop(model, x, y, adapted=lambda name: name.startswith("2."))
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), phi[name], **CLOSE)


def test_the_proximal_term_pulls_but_is_not_in_the_support_losses() -> None:
    model, ((x, y),) = _plain(), _pairs(5)
    tasks = fastmeta.adapt(model, (x[None], y[None]), prox=PROX, **OPTIONS)
    phi, losses = _inner_loop(model, x, y, prox=PROX)
    torch.testing.assert_close(tasks.support_losses[:, 0], torch.stack(losses), **CLOSE)
    for name, value in phi.items():
        torch.testing.assert_close(tasks.parameters[name][0], value, **CLOSE)


@MODELS
def test_ragged_support_in_the_callers_order(make: Callable[[], nn.Module]) -> None:
    # By size the order is 0, 3, 1, 4, 2, which is not its own inverse.
    model, support = make(), _pairs(2, 3, 5, 2, 3)
    queries = [torch.randn(count, 3, dtype=torch.float64) for count in (4, 2, 3, 4, 3)]
    tasks = fastmeta.adapt(model, support, **OPTIONS)
    predictions = tasks(queries)
    for i, ((x, y), query) in enumerate(zip(support, queries, strict=True)):
        phi, losses = _inner_loop(model, x, y)
        expected = oracle.call(model, phi, query).detach()
        torch.testing.assert_close(predictions[i], expected, **CLOSE)
        torch.testing.assert_close(tasks[i](query).detach(), expected, **CLOSE)
        torch.testing.assert_close(tasks.support_losses[:, i], torch.stack(losses), **CLOSE)


def test_no_steps_give_the_model_itself() -> None:
    model, query = _plain(), torch.randn(TASKS, 6, 3, dtype=torch.float64)
    tasks = fastmeta.adapt(model, _stacked(_pairs(*[5] * TASKS)), inner_steps=0)
    assert tasks.support_losses.shape == (0, TASKS)
    torch.testing.assert_close(tasks(query), model(query).detach(), **CLOSE)


def test_maml_adapts_with_its_own_learned_rates() -> None:
    model, support = _plain(), _stacked(_pairs(*[5] * TASKS))
    maml = fastmeta.MAML(model, learn_inner_lr="element", **OPTIONS)
    got, expected = maml.adapt(support), fastmeta.adapt(model, support, **OPTIONS)
    for name, value in expected.parameters.items():
        torch.testing.assert_close(got.parameters[name], value, **CLOSE)
        assert not got.parameters[name].requires_grad
    assert maml.adapt(support, inner_steps=1).support_losses.shape == (1, TASKS)


def _tasks() -> tuple[nn.Module, fastmeta.AdaptedTasks]:
    model = _plain()
    return model, fastmeta.adapt(model, _stacked(_pairs(*[5] * TASKS)), **OPTIONS)


def test_it_is_a_sequence_of_modules() -> None:
    _, tasks = _tasks()
    x = torch.randn(6, 3, dtype=torch.float64)
    modules = list(tasks)
    assert len(tasks) == len(modules) == TASKS
    for i, module in enumerate(modules):
        assert type(module) is nn.Sequential
        assert torch.equal(module(x), tasks[i](x))
        assert torch.equal(module(x), tasks[i - TASKS](x))
    assert not torch.equal(modules[0](x), modules[1](x))
    for index in (TASKS, -TASKS - 1):
        with pytest.raises(IndexError, match=f"task {index}: there are {TASKS}"):
            tasks[index]


@pytest.mark.parametrize("count", [TASKS - 1, TASKS + 1])
def test_another_number_of_tasks_is_refused(count: int) -> None:
    _, tasks = _tasks()
    x = torch.randn(count, 6, 3, dtype=torch.float64)
    for inputs in (x, list(x)):
        with pytest.raises(ValueError, match=f"x: {count} tasks, but {TASKS} were adapted"):
            tasks(inputs)


def test_an_adapted_module_and_the_model_do_not_touch_each_other() -> None:
    model, support = _batch_norm(), _stacked(_pairs(*[5] * TASKS))
    fastmeta.maml_step(model, support, support, **OPTIONS).loss.backward()
    before = copy.deepcopy(model.state_dict())
    tasks = fastmeta.adapt(model, support, **OPTIONS)
    module = tasks[0]
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = tasks[0](x).detach()
    _spoil(module)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(tasks[0](x).detach(), expected, rtol=0, atol=0)
    untouched = tasks[0]
    _spoil(model)
    torch.testing.assert_close(untouched(x).detach(), expected, rtol=0, atol=0)


def _spoil(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.add_(1)


def test_what_was_adapted_does_not_change_with_the_model() -> None:
    model, tasks = _tasks()
    x = torch.randn(TASKS, 6, 3, dtype=torch.float64)
    together, one = tasks(x), tasks[1](x[1]).detach()
    _spoil(model)
    torch.testing.assert_close(tasks(x), together, rtol=0, atol=0)
    torch.testing.assert_close(tasks[1](x[1]).detach(), one, rtol=0, atol=0)


def test_a_subset_keeps_the_rest_as_it_was_when_adapted() -> None:
    model = _plain()
    tasks = fastmeta.adapt(model, _stacked(_pairs(*[5] * TASKS)), adapt="2", **OPTIONS)
    x = torch.randn(TASKS, 6, 3, dtype=torch.float64)
    together = tasks(x)
    _spoil(model)
    torch.testing.assert_close(tasks(x), together, rtol=0, atol=0)


def test_in_inference_mode_with_data_of_its_own() -> None:
    model = _plain()
    with torch.inference_mode():
        support = _stacked(_pairs(*[5] * TASKS))
        tasks = fastmeta.adapt(model, support, **OPTIONS)
        predictions = tasks(torch.randn(TASKS, 6, 3, dtype=torch.float64))
    assert predictions.shape == (TASKS, 6, 2)
    assert all(p.requires_grad and not p.is_inference() for p in tasks[0].parameters())


def _average() -> nn.Module:
    """Its batch norm reads a counter as a number, which no vmap can."""
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)
    ).double()


@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_batch_norm_that_averages_over_all_passes(executor: str, monkeypatch) -> None:
    support, x = _stacked(_pairs(*[4] * TASKS)), torch.randn(TASKS, 5, 3, dtype=torch.float64)
    adapted = fastmeta.adapt(_average(), support, **OPTIONS, executor=executor)
    expected = torch.stack([module(part) for module, part in zip(adapted, x, strict=True)])
    torch.testing.assert_close(adapted(x), expected, **CLOSE)
    monkeypatch.delattr("fastmeta.adaptation.vmap")  # tried once
    torch.testing.assert_close(adapted(x), expected, **CLOSE)


def test_an_error_of_adapted_tasks_is_the_models_own() -> None:
    adapted = fastmeta.adapt(_plain(), _stacked(_pairs(*[4] * TASKS)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        adapted(torch.randn(TASKS, 4, 7, dtype=torch.float64))
    assert adapted(torch.randn(TASKS, 4, 3, dtype=torch.float64)).shape == (TASKS, 4, 2)
