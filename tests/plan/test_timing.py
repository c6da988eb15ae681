"""Forms chosen by the clock: timed once a plan, and what was timed is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta
from fastmeta.plan import timing


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ELU(), nn.Flatten(), nn.Linear(64, 2)
    )  # fmt: skip


def _data(tasks: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, 4, 1, 4, 4), torch.randint(2, (tasks, 4))


@pytest.fixture
def seconds(monkeypatch) -> dict[str, float]:
    """The factor that each form's timing is to give; one that was timed is noted in `timed`."""
    factors: dict[str, Any] = {"timed": []}

    def factor(reading, problem, executor, keeps_features) -> float:
        factors["timed"].append(executor.name)
        return factors[executor.name]

    monkeypatch.setattr(timing, "may_time", lambda problem: True)
    monkeypatch.setattr(timing, "factor", factor)
    return factors


@pytest.mark.parametrize(
    ("fastest", "executor", "form"),
    [
        ("loop", "generic", "loop"), ("vmap", "generic", "vmap"),
        ("layered-torch", "layered-torch", "layered"),
    ],
)  # fmt: skip
def test_the_fastest_is_taken(
    fastest: str, executor: str, form: str, seconds: dict[str, Any]
) -> None:
    seconds.update({"loop": 1e4, "vmap": 1e4, "layered-torch": 1e4})
    seconds[fastest] = 1.0
    model = _network()
    text = fastmeta.explain(model, _data(), _data())
    out = fastmeta.maml_step(model, _data(), _data())
    assert out.executor == executor
    assert text.partition("\nform: ")[2].startswith(form)
    assert "(timed on some tasks: " in text
    assert "ms layered-torch" in text


def test_it_is_timed_once_for_any_number_of_tasks(seconds: dict[str, Any]) -> None:
    seconds.update({"loop": 2.0, "vmap": 2.0, "layered-torch": 1.0})
    model = _network()
    for tasks in (6, 3, 5):
        fastmeta.maml_step(model, _data(tasks), _data(tasks), inner_steps=tasks)
    assert sorted(seconds["timed"]) == ["layered-torch", "loop", "vmap"]


def test_what_could_not_be_taken_before_is_timed_later(seconds: dict[str, Any]) -> None:
    seconds.update({"loop": 1e4, "vmap": 1.0, "layered-torch": 1e4})
    model = _network()
    fastmeta.maml_step(model, _data(1), _data(1), executor="generic")
    assert not seconds["timed"]  # the loop is alone
    fastmeta.maml_step(model, _data(1), _data(1))
    assert sorted(seconds["timed"]) == ["layered-torch", "loop"]
    assert fastmeta.maml_step(model, _data(), _data()).executor == "generic"
    assert sorted(seconds["timed"]) == ["layered-torch", "loop", "vmap"]


def test_where_they_are_close_the_estimate_holds(seconds: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr("fastmeta.executors.generic.cost.loop", lambda *_: 1.0)
    monkeypatch.setattr("fastmeta.executors.generic.cost.vmap", lambda *_: 1.0)
    seconds.update({"loop": 1.0, "vmap": 0.9 * 0.95, "layered-torch": 2 * 0.97})
    # By estimate the rules take half the time of the others.
    assert fastmeta.maml_step(_network(), _data(), _data()).executor == "layered-torch"
    text = fastmeta.explain(_network(), _data(), _data(), executor="generic")
    times = "timed on some tasks: 950 ms vmap, 1e+03 ms loop"
    assert f"form: loop, task by task ({times})" in text


def test_low_memory_asks_no_clock(seconds: dict[str, Any]) -> None:
    fastmeta.maml_step(_network(), _data(), _data(), memory="low")
    fastmeta.maml_step(_network(), _data(), _data(), executor="layered")
    assert not seconds["timed"]


def test_drawn_numbers_and_determinism_depend_on_no_clock(monkeypatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(timing, "factor", lambda *given: timed.append("form") or 1.0)
    dropping = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    plain = nn.Sequential(nn.Linear(3, 4), nn.Hardswish(), nn.Linear(4, 2))
    data = torch.randn(3, 4, 3), torch.randint(2, (3, 4))

    def steps() -> None:
        for model in (dropping, plain):
            fastmeta.maml_step(model, data, data, executor="generic")

    steps()  # the tests ask torch for determinism
    assert not timed
    torch.use_deterministic_algorithms(False)
    try:
        fastmeta.maml_step(dropping, data, data, executor="generic")
        assert not timed
        fastmeta.maml_step(nn.Sequential(*plain), data, data, executor="generic")
        assert timed
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_a_sample_leaves_the_model_and_its_numbers_alone(monkeypatch) -> None:
    monkeypatch.setattr(timing, "may_time", lambda problem: True)
    model, data = _network(), _data()
    state = torch.get_rng_state()
    before = [p.clone() for p in model.parameters()]
    text = fastmeta.explain(model, data, data, inner_steps=4, step_weights=[0.2] * 5)
    assert "timed on some tasks" in text
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_form_alone_is_not_said_to_have_been_timed(seconds: dict[str, Any]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x.flatten(1))
            return h if h.sum().item() > 0 else 2 * h

    seconds.update({"loop": 1.0, "vmap": 0.1})
    text = fastmeta.explain(Branching(), _data(), _data())
    assert "form: loop, " in text
    assert "\n  not vmap: " in text
    assert "timed" not in text
