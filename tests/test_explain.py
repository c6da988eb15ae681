"""`explain`: what the text says, and that asking changes nothing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta


class Branching(nn.Module):
    """Control flow on the data, which no tracer reads and no batching rule serves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else self.layer(-x)


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _tasks(*shape: int, tasks: int = 3):
    def examples(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, count, *shape), torch.randint(2, (tasks, count))

    return examples(4), examples(5)


def test_it_names_layers_loss_executor_form_and_reason() -> None:
    text = fastmeta.explain(_convolutional(), *_tasks(1, 4, 4), inner_steps=3, executor="generic")
    lines = text.splitlines()
    assert lines[0].startswith("model: Sequential, 6 layers")
    kinds = ("Conv2d", "BatchNorm", "relu", "max_pool2d", "Flatten", "Linear")
    for kind, line in zip(kinds, lines[1:7], strict=True):
        assert kind in line
    assert "-> [4, 2, 2]" in lines[4]
    assert "512 FLOP" not in lines[4]
    assert "1,152 FLOP" in lines[1]  # 2 * 4 channels * 4 * 4 pixels * 9 taps
    assert "loss: cross_entropy" in lines
    assert "inner loop: 3 steps, second order; adapting: 6 parameters" in lines
    assert any(line.startswith("executor: generic on cpu") for line in lines)
    assert any(line.startswith("form: ") and "estimated" in line for line in lines)


@pytest.mark.parametrize("form", ["vmap", "loop", "sweep"])
def test_it_names_the_form_that_is_chosen(form: str, force_form) -> None:
    force_form(form)
    assert f"form: {form}" in fastmeta.explain(_mlp(), *_tasks(3))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"first_order": True}, "inner loop: 1 step, first order; adapting: 4 parameters"),
        ({"adapt": "2"}, "inner loop: 1 step, second order; adapting: 2 parameters"),
        ({"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, "label_smoothing=0.1"),
        ({"loss_fn": lambda y, t: F.cross_entropy(y, t)}, "loss: cross_entropy"),
        ({"loss_fn": lambda y, t: y.exp().mean()}, "loss: not a standard one"),
        ({"memory": "low", "inner_steps": 2}, "inner loop reversible"),
        (
            {"memory": "low", "executor": "generic"},
            "not vmap: memory='low' asks for memory flat in K",
        ),
        (
            {"memory": "low", "executor": "generic"},
            "form: sweep, task by task, memory flat in K (no other can compute it as asked)",
        ),
    ],
)
def test_it_names_the_options(options: dict, line: str) -> None:
    assert line in fastmeta.explain(_mlp(), *_tasks(3), **options)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(Branching(), "torch.fx can't trace its forward", id="branching"),
        pytest.param(
            nn.Sequential(nn.Linear(3, 4), nn.AlphaDropout(0.1), nn.Linear(4, 2)),
            "is in train(), and the kernels draw no random numbers",
            id="dropout",
        ),
    ],
)
def test_it_says_why_a_model_cant_be_read(model: nn.Module, reason: str) -> None:
    first = fastmeta.explain(model, *_tasks(3)).splitlines()[0]
    assert first.startswith(f"model: {type(model).__name__}, not read into layers: ")
    assert reason in first


def test_it_names_a_layer_without_rules_and_what_that_costs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    text = fastmeta.explain(model, *_tasks(3))
    assert "PReLU" in text.splitlines()[2]
    assert re.search(r"not (fused|compiled): layer '1' \(PReLU\) is none that", text)


def test_it_says_why_vmap_cant_serve() -> None:
    text = fastmeta.explain(Branching(), *_tasks(3, tasks=8))
    assert "form: loop, task by task" in text
    assert ".item()" in text.partition("  not vmap: ")[2].splitlines()[0]


def test_it_says_of_each_group_of_ragged_tasks_how_it_is_computed() -> None:
    def pairs(*counts: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(n, 1, 4, 4), torch.randint(2, (n,))) for n in counts]

    # Batch norm mixes examples, so tasks can't be padded to one size.
    text = fastmeta.explain(_convolutional(), pairs(3, 4, 4), pairs(5, 5, 5))
    assert "form for 1 task of 3 + 5 examples: " in text
    assert "form for 2 tasks of 4 + 5 examples: " in text


def test_the_arithmetic_is_that_of_all_tasks_and_steps() -> None:
    text = fastmeta.explain(nn.Linear(3, 2), *_tasks(3, tasks=7), inner_steps=2)
    forward = 2 * 3 * 2
    # (3 + 6) passes for each of the support's examples and steps, 3 for each of the query's.
    total = 7 * forward * (9 * 2 * 4 + 3 * 5)
    assert f"arithmetic: {total:,} FLOP" in text


@pytest.mark.parametrize("name", ["inner_steps", "loss_fn", "executor"])
def test_it_refuses_what_maml_step_refuses(name: str) -> None:
    model, tasks, options = _mlp(), _tasks(3), {name: "nonsense"}
    with pytest.raises((TypeError, ValueError)) as refused:
        fastmeta.maml_step(model, *tasks, **options)
    with pytest.raises(type(refused.value), match=f"^{name}: ") as explained:
        fastmeta.explain(model, *tasks, **options)
    assert str(explained.value) == str(refused.value)


def test_asking_changes_nothing() -> None:
    model, tasks = _convolutional(), _tasks(1, 4, 4)
    twin = copy.deepcopy(model)
    fastmeta.maml_step(model, *tasks).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    first = fastmeta.explain(model, *tasks)
    assert fastmeta.explain(model, *tasks) == first
    assert torch.equal(torch.get_rng_state(), generator)
    state = twin.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_step_gives_the_same_numbers_whether_or_not_one_asked() -> None:
    model, tasks = _mlp(), _tasks(3)
    twin = copy.deepcopy(model)
    fastmeta.explain(model, *tasks)
    losses = [fastmeta.maml_step(m, *tasks).loss.detach() for m in (model, twin)]
    assert torch.equal(*losses)


def test_a_steps_result_prints_as_a_line() -> None:
    data = torch.randn(2, 4, 3), torch.randint(2, (2, 4))
    out = fastmeta.maml_step(_mlp(), data, data)
    assert repr(out) == f"MetaStep(loss={out.loss.detach()}, tasks=2, executor='{out.executor}')"
