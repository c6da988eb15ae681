"""What can be copied, pickled and saved, and gives the same numbers afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.algorithms.maml import LEARNED
from fastmeta.arguments import plan_step
from fastmeta.options import Options
from fastmeta.plan.snapshot import snapshot

STEPS = 2


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda value: pickle.loads(pickle.dumps(value)), id="pickle"),
        pytest.param(_saved, id="torch.save"),
    ],
)
KINDS = pytest.mark.parametrize("kind", [None, *LEARNED])
Duplicate = Callable[[Any], Any]


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def _tasks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(3, count, 3, dtype=torch.float64, generator=random)
        return x, torch.randint(2, (3, count), generator=random)

    return examples(4), examples(5)


def _maml(kind: str | None) -> fastmeta.MAML:
    return fastmeta.MAML(_model(), inner_lr=0.1, inner_steps=STEPS, learn_inner_lr=kind)


def _numbers(maml: fastmeta.MAML) -> list[Tensor]:
    maml.zero_grad()
    out = maml(*_tasks())
    out.loss.backward()
    gradients = [p.grad.clone() for p in maml.parameters()]
    maml.zero_grad()
    return [out.loss.detach(), out.query_outputs, *gradients]


@COPIES
@KINDS
def test_maml_gives_the_same_numbers(kind: str | None, duplicate: Duplicate) -> None:
    maml = _maml(kind)
    numbers = _numbers(maml)  # before the copy: what a step leaves behind must copy too
    assert all(map(torch.equal, _numbers(duplicate(maml)), numbers))


@COPIES
def test_a_copied_maml_shares_nothing(duplicate: Duplicate) -> None:
    maml = _maml("element")
    numbers, twin = _numbers(maml), duplicate(maml)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert all(map(torch.equal, _numbers(maml), numbers))
    assert not torch.equal(_numbers(twin)[0], numbers[0])


@KINDS
def test_state_dict_goes_there_and_back(kind: str | None) -> None:
    source, target = _maml(kind), _maml(kind)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.01 * torch.rand_like(p))
    assert not torch.equal(_numbers(source)[0], _numbers(target)[0])
    target.load_state_dict(_saved(source.state_dict()))
    assert all(map(torch.equal, _numbers(source), _numbers(target)))


def test_the_models_own_state_dict_has_its_own_names() -> None:
    maml = _maml("layer")
    assert set(maml.model.state_dict()) == set(_model().state_dict())


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (None, []),
        ("scalar", [()]),
        ("step", [(STEPS,)]),
        ("layer", [(), (), (), ()]),
        ("layer-step", [(STEPS, 1, 1), (STEPS, 1), (STEPS, 1, 1), (STEPS, 1)]),
        ("element", [(4, 3), (4,), (2, 4), (2,)]),
    ],
)
def test_learned_rates_are_the_parameters_that_the_documentation_says(
    kind: str | None, shapes: list[tuple[int, ...]]
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    maml = fastmeta.MAML(model, inner_lr=0.1, inner_steps=STEPS, learn_inner_lr=kind)
    own = {id(p) for p in model.parameters()}
    rates = [p for p in maml.parameters() if id(p) not in own]
    assert [tuple(rate.shape) for rate in rates] == shapes
    assert all(rate.dtype == torch.float64 and bool((rate == 0.1).all()) for rate in rates)
    assert len(list(maml.parameters())) == len(own) + len(shapes)


def test_only_what_adapts_has_a_learned_rate() -> None:
    maml = fastmeta.MAML(_model(), learn_inner_lr="layer", adapt="3")
    assert set(maml.inner_lr) == {"3.weight", "3.bias"}


def test_a_parameter_given_as_inner_lr_is_registered_and_a_tensor_is_not() -> None:
    learned, fixed = nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1)
    rates = {"weight": learned, "bias": fixed}
    maml = fastmeta.MAML(nn.Linear(3, 2), inner_lr=rates)
    assert [p for p in maml.parameters() if p is learned]
    assert not [p for p in maml.parameters() if p is fixed]
    assert maml.inner_lr["weight"] is learned
    assert maml.inner_lr["bias"] is fixed


@COPIES
def test_a_model_after_a_step(duplicate: Duplicate) -> None:
    model = _model()
    fastmeta.maml_step(model, *_tasks(), inner_steps=STEPS).loss.backward()
    twin = duplicate(model)
    assert all(map(torch.equal, twin.state_dict().values(), model.state_dict().values()))
    losses = [fastmeta.maml_step(m, *_tasks(), inner_steps=STEPS).loss for m in (model, twin)]
    assert torch.equal(*(loss.detach() for loss in losses))


@COPIES
def test_a_meta_steps_tensors(duplicate: Duplicate) -> None:
    out = fastmeta.maml_step(_model(), *_tasks(), inner_steps=STEPS)
    for tensor in (out.loss.detach(), out.task_losses, out.query_outputs, out.support_losses):
        assert torch.equal(duplicate(tensor), tensor)


@COPIES
def test_a_meta_step_without_gradient(duplicate: Duplicate) -> None:
    with torch.no_grad():
        out = fastmeta.maml_step(_model(), *_tasks(), inner_steps=STEPS)
    twin = duplicate(out)
    assert torch.equal(twin.loss, out.loss)
    assert twin.executor == out.executor


@COPIES
@pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(F.cross_entropy, id="plain"),
        pytest.param(nn.CrossEntropyLoss(label_smoothing=0.1), id="options"),
        pytest.param(nn.CrossEntropyLoss(weight=torch.ones(2).double()), id="tensor-option"),
        pytest.param(lambda y, t: F.cross_entropy(2 * y, t), id="opaque"),
    ],
)
def test_a_reading(loss_fn: Any, duplicate: Duplicate) -> None:
    model = _model()
    options = Options(inner_lr=0.1, inner_steps=STEPS, loss_fn=loss_fn)
    step = plan_step(model, snapshot(model), *_tasks(), options, True)
    reading = step.groups[0][1].selected.reading
    twin = duplicate(reading)
    assert twin.profile == reading.profile
    assert twin.network == reading.network
    assert str(twin.loss) == str(reading.loss)
    assert twin.unreadable == reading.unreadable


@COPIES
def test_adapted_tasks(duplicate: Duplicate) -> None:
    support, (x, _) = _tasks()
    tasks = fastmeta.adapt(_model(), support, inner_steps=STEPS)
    twin = duplicate(tasks)
    assert len(twin) == len(tasks)
    assert torch.equal(twin.support_losses, tasks.support_losses)
    assert torch.equal(twin(x), tasks(x))
    assert torch.equal(twin[1](x[1]), tasks[1](x[1]))


@COPIES
def test_one_adapted_module(duplicate: Duplicate) -> None:
    support, (x, _) = _tasks()
    module = fastmeta.adapt(_model(), support, inner_steps=STEPS)[1]
    twin = duplicate(module)
    assert torch.equal(twin(x[1]), module(x[1]))
