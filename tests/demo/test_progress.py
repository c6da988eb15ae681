"""What a person sees of a training run, with a terminal and without."""

import re

import pytest
import torch

from fastmeta.demo.confidence import estimate
from fastmeta.demo.progress import Progress


def train(progress: Progress) -> None:
    for i in progress:
        progress.loss(torch.tensor(float(i)))
        progress.note(f"note {i}")


def test_plain_lines_are_few_and_carry_the_mean_loss(capsys):
    progress = Progress("training", iterations=40, tasks=5)
    train(progress)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"training  4/40  loss 1\.5000  [\d,]+ tasks/s  note 3", lines[0])
    assert re.fullmatch(r"training  40/40  loss 37\.5000  [\d,]+ tasks/s  note 39", lines[-1])
    assert progress.done == 40
    assert progress.seconds > 0


def test_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    train(Progress("training", iterations=3, tasks=5))
    printed = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "3/3" in printed
    assert "loss" in printed


def test_time_limit(capsys):
    progress = Progress("training", iterations=10**9, tasks=5, minutes=1e-4)
    train(progress)
    assert progress.fraction >= 1
    assert progress.done < 10**9
    assert "training" in capsys.readouterr().out


def test_estimate():
    result = estimate(torch.tensor([1.0, 3.0]).repeat(50).double())
    assert result.mean == pytest.approx(2)
    assert result.half_width == pytest.approx(0.196, rel=0.01)
    assert str(result) == "2.00 ± 0.20"
    assert estimate(torch.tensor([0.5, 0.5])).percent() == "50.0 ± 0.0 %"
