"""`MAML(capture=True)`: what is recorded, when anew, and what a replay leaves alone.

The graph itself is CUDA's; here a stand-in runs the recorded step again in the same memory.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import compiling
import pytest
import torch
from mlps import examples, mlp
from torch import nn

import fastmeta
from fastmeta import capture
from fastmeta.executors.problem import Outcome
from fastmeta.plan import planner

on_host = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")


@pytest.fixture
def recorded(cuda_plays, monkeypatch) -> list[Outcome]:
    """The outcomes of all recordings, made on the host."""
    made: list[Outcome] = []

    def tensors(outcome: Outcome) -> list[torch.Tensor]:
        found = [g for _, g in outcome.gradients if g is not None]
        return [outcome.step_losses, outcome.support_losses, outcome.query_outputs, *found]

    def record(planned):
        outcome = planner.compute(planned)
        made.append(outcome)

        def replay() -> None:
            torch._foreach_copy_(tensors(outcome), tensors(planner.compute(planned)))

        for tensor in tensors(outcome):
            tensor.fill_(torch.nan)
        return outcome, replay

    monkeypatch.setattr(capture, "record", record)
    return made


def network() -> nn.Module:
    return mlp(3, 5, 2, activation=nn.Tanh())


def data(model: nn.Module, tasks: int = 3):
    return [examples(tasks, n, model, True) for n in (4, 5)]


def agree(maml: fastmeta.MAML, batch, executor: str = "fused-cuda-on-host", **options: Any) -> None:
    """The captured step gives what a plain one gives."""
    leaves = list(maml.parameters())
    out = maml(*batch, **options)
    plain = fastmeta.MAML(
        maml.model, inner_lr=maml.inner_lr, inner_steps=maml.inner_steps, executor=maml.executor
    )
    expected = plain(*batch, **options)
    for a, b in [
        (out.loss, expected.loss), (out.task_losses, expected.task_losses),
        (out.support_losses, expected.support_losses), (out.query_outputs, expected.query_outputs),
        *zip(
            torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected.loss, leaves),
            strict=True,
        ),
    ]:  # fmt: skip
        assert torch.equal(a, b)
    assert out.executor == executor


@on_host
@pytest.mark.parametrize("learned", [None, "layer-step", "element"])
def test_a_replay_takes_new_data_and_new_parameters(learned: str | None, recorded) -> None:
    model = network()
    maml = fastmeta.MAML(model, inner_lr=0.2, inner_steps=2, capture=True, learn_inner_lr=learned)
    for _ in range(3):
        agree(maml, data(model))
        agree(maml, data(model), task_weights=torch.rand(3).double())
        with torch.no_grad():
            for p in maml.parameters():
                p.mul_(0.9)
    assert len(recorded) == 1
    with torch.no_grad():
        assert not maml(*data(model)).loss.requires_grad
    assert len(recorded) == 2


@on_host
def test_what_a_graph_takes_for_constant_is_recorded_anew(recorded) -> None:
    model = network()
    maml = fastmeta.MAML(model, inner_lr=0.2, inner_steps=2, capture=True)
    agree(maml, data(model))
    agree(maml, data(model, tasks=4))
    assert len(recorded) == 2
    maml._fixed_lr[""] = 0.3
    agree(maml, data(model))
    assert len(recorded) == 3
    model[0].weight.data = model[0].weight.data.clone() * 2  # in another place
    agree(maml, data(model))
    assert len(recorded) == 4
    agree(maml, data(model))
    assert len(recorded) == 4


@on_host
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_step_by_tritons_layers_is_recorded_too(recorded, triton_plays) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3, 2),
    )  # fmt: skip
    maml = fastmeta.MAML(model, inner_lr=0.2, executor="layered", capture=True)

    def batch() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(2, 3, 1, 4, 4), torch.randint(2, (2, 3))) for _ in "sq"]

    for _ in range(2):
        agree(maml, batch(), "layered-triton-on-host")
        with torch.no_grad():
            for p in maml.parameters():
                p.mul_(0.9)
    assert len(recorded) == 1
    torch.set_float32_matmul_precision("medium")
    try:
        agree(maml, batch(), "layered-triton-on-host")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(recorded) == 2


@on_host
def test_a_switch_of_precision_records_anew(recorded) -> None:
    model = network().float()
    batch = [(x.float(), y) for x, y in data(model)]
    maml = fastmeta.MAML(model, capture=True)
    full = maml(*batch).loss
    torch.set_float32_matmul_precision("high")
    try:
        assert not torch.equal(maml(*batch).loss, full)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(maml(*batch).loss, full)
    assert len(recorded) == 2


@on_host
def test_results_outlive_the_next_replay(recorded) -> None:
    model = network()
    maml = fastmeta.MAML(model, inner_lr=0.2, capture=True)
    batches = [data(model), data(model)]
    steps = [maml(*batch) for batch in batches]
    kept = [step.task_losses.clone() for step in steps]
    (steps[0].loss + steps[1].loss).backward()
    assert len(recorded) == 1
    assert [*map(torch.equal, (step.task_losses for step in steps), kept)] == [True, True]
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for batch in batches:
        fastmeta.maml_step(model, *batch, inner_lr=0.2).loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), found, strict=True))


@on_host
def test_no_more_than_a_few_are_kept(recorded) -> None:
    model = network()
    maml = fastmeta.MAML(model, capture=True)
    for tasks in (*range(1, 11), 10, 1):
        maml(*data(model, tasks))
    assert len(recorded) == 11  # the last is still there, the first is not


@on_host
def test_where_recording_fails_steps_run_all_the_same(recorded, monkeypatch) -> None:
    def refuse(planned):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(capture, "record", refuse)
    model = network()
    maml = fastmeta.MAML(model, inner_lr=0.2, inner_steps=2, capture=True)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted when"):
        agree(maml, data(model))
    agree(maml, data(model))  # warnings are errors here


def test_on_the_processor_it_warns_once() -> None:
    model = network()
    maml = fastmeta.MAML(model, capture=True)
    batch = data(model)
    with pytest.warns(
        UserWarning,
        match="without a CUDA graph: .* it runs on the processor",
    ):
        out = maml(*batch)
    assert torch.equal(out.loss, maml(*batch).loss)


@on_host
@pytest.mark.parametrize("again", [copy.deepcopy, lambda maml: pickle.loads(pickle.dumps(maml))])
def test_a_copy_records_for_itself(again, recorded) -> None:
    model = network()
    maml = fastmeta.MAML(model, inner_lr=0.2, capture=True)
    agree(maml, data(model))
    agree(again(maml), data(model))
    assert len(recorded) == 2
