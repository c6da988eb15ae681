"""The scripts of examples/, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from data.tiny_omniglot import write_zips

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def load(name: str) -> ModuleType:
    """Import `examples/<name>.py` anew, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed_row(printed: str, name: str) -> list[float]:
    """The numbers of one row of the printed table."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return [float(number) for number in line.removeprefix(name).split()]


@pytest.fixture(params=["mnist", "omniglot"])
def images(request, tmp_path, monkeypatch) -> tuple[ModuleType, list[str]]:
    """The example with few images to test on, and its options: real MNIST, made-up Omniglot."""
    example = load("neural_field")
    monkeypatch.setattr(example, "TEST_IMAGES", 8)
    monkeypatch.setattr(example, "SEARCH_IMAGES", 3)
    data = ROOT.parent / "shared" / "data" / "mnist"
    if request.param == "omniglot":
        data = write_zips(tmp_path, alphabets=2, characters=6, drawings=2)
        monkeypatch.setattr(example, "HELD_OUT_CHARACTERS", 4)
    elif not data.is_dir():
        pytest.skip("the real MNIST does not lie in ../shared/data beside the checkout")
    return example, ["--data", str(data), "--dataset", request.param]


def test_neural_field_learns_a_start(images, tmp_path, capsys):
    example, options = images
    picture = tmp_path / "images.png"
    table = example.main([*options, "--steps", "30", "--out", str(picture)])

    at_two_steps = example.TEST_STEPS.index(2)
    learned = table["meta-learned start"]
    for rule in ("gradient descent", "Adam"):
        # Measured: 5.7 dB on MNIST and 4.3 dB on the made-up characters above the better rule.
        assert learned[at_two_steps] > table[f"random start, {rule}"][at_two_steps] + 2
    assert learned == sorted(learned), "each further step improves the reconstruction"
    printed = printed_row(capsys.readouterr().out, "meta-learned start")
    assert printed == pytest.approx(learned, abs=0.051)
    assert picture.read_bytes().startswith(PNG)


def test_a_context_adapts(monkeypatch, capsys):
    example = load("cavia")
    monkeypatch.setattr(example, "TEST_TASKS", 100)
    table = example.main(["--steps", "300"])
    # Measured: 3.6 before and 1.3 after five steps; of MAML 3.2 and 1.7.
    assert table["CAVIA"][-1] < 0.6 * table["CAVIA"][0]
    assert table["MAML"][-1] < 0.8 * table["MAML"][0]
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("CAVIA    "))
    means = [float(cell.split()[-1]) for cell in line.split("±")[:-1]]
    assert means == pytest.approx(table["CAVIA"], abs=0.0051)


def test_the_context_stays_zero():
    example = load("cavia")
    learner = example.train("CAVIA", 3)
    assert not learner.model.context.any()


def test_policy_adapts(tmp_path, monkeypatch, capsys):
    example = load("policy")
    monkeypatch.setattr(example, "TASKS", 10)
    monkeypatch.setattr(example, "TEST_GOALS", 10)
    monkeypatch.setattr(example, "SEARCHED_LRS", (0.1,))
    picture = tmp_path / "episodes.png"
    table = example.main(["--steps", "8", "--out", str(picture)])

    before, *updated = table["MAML"]
    assert len(updated) == 3
    # Measured: -30.9 before and -18.2 after the first update; before meta-training, -681 before.
    assert before > -120
    assert updated[0] > 0.8 * before
    printed = printed_row(capsys.readouterr().out, "MAML")
    assert printed == pytest.approx(table["MAML"], abs=0.051)
    assert picture.read_bytes().startswith(PNG)


def test_episodes_end_at_the_goal_and_count_no_further():
    example = load("policy")
    goals = example.torch.tensor([[0.1, 0.0], [0.5, 0.5]]).numpy()
    right = example.torch.tensor([5.0, 0.0])  # faster than the agent can: clipped to 0.1
    (positions, _), mean_return = example.play(right.expand_as, example.torch.zeros(2), goals)

    steps = (example.HORIZON, example.EPISODES)
    x, y = positions.unflatten(1, steps).unbind(-1)  # [T, H, E]
    assert x[0, 1:] == pytest.approx(0.1), "stands still at the goal"
    assert x[1, :, 0].tolist() == pytest.approx([0.1 * step for step in range(steps[0])], rel=1e-4)
    assert not y.any()
    # The first episode ends on the goal, the second passes by: sum of 0.5^2 + (0.5 - 0.1 n)^2.
    passing = sum(0.5**2 + (0.5 - 0.1 * step) ** 2 for step in range(1, steps[0] + 1))
    assert mean_return == pytest.approx(-passing / 2, rel=1e-4)


def test_advantages_leave_out_what_comes_after_the_end():
    example = load("policy")
    rewards = -example.np.arange(1.0, 7.0).reshape(3, 1, 2)  # [H, T, E]
    played = example.np.ones((3, 1, 2), bool)
    rewards[2, 0, 1] = played[2, 0, 1] = 0
    # Returns: -9 and -6, -8 and -4, -5. Of the last there is one: nothing to compare with.
    centred = example.np.array([[-1.5, 1.5], [-2, 2], [0, 0]])[:, None]
    expected = centred / example.np.sqrt((centred**2).mean())
    assert example.advantages(rewards, played) == pytest.approx(expected)
