"""`python -m fastmeta demo`, from the command line to the picture."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from data.tiny_omniglot import BACKGROUND, write_zips

import fastmeta.demo.command as command
from fastmeta.__main__ import main
from fastmeta.demo.algorithms import ALGORITHMS

PNG = b"\x89PNG\r\n\x1a\n"


def run(folder: Path, *arguments: str) -> str:
    """Run a demonstration in `folder` as a person would; returns what it printed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastmeta", "demo", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # spinning threads slow down busy machines
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_sinusoid_is_the_default(tmp_path):
    printed = run(tmp_path, "--iterations", "3")
    assert "3/3" in printed
    assert "executor" in printed
    for word in ("MAML", "joint training", "before", "1 step", "5 steps", "10 steps", "±"):
        assert word in printed
    assert (tmp_path / "fastmeta-sinusoid.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_omniglot(tmp_path, network, monkeypatch):
    write_zips(tmp_path, alphabets=3, characters=6, drawings=4)
    monkeypatch.setattr("fastmeta.demo.omniglot.TEST_TASKS", 6)
    monkeypatch.setattr("fastmeta.demo.omniglot.VALIDATION_TASKS", 4)
    picture = tmp_path / "task.png"
    arguments = ["--iterations", "3", "--ways", "2", "--shots", "2", "--output", str(picture)]
    options = ["--data", str(tmp_path), "--network", network, "--test-steps", "3"]
    assert main(["demo", "omniglot", *arguments, *options]) == 0
    assert picture.read_bytes().startswith(PNG)
    assert (tmp_path / "task-curve.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_omniglot(tmp_path, algorithm, monkeypatch, capsys):
    write_zips(tmp_path, alphabets=3, characters=6, drawings=4)
    monkeypatch.setattr("fastmeta.demo.omniglot.TEST_TASKS", 6)
    monkeypatch.setattr("fastmeta.demo.omniglot.VALIDATION_TASKS", 4)
    arguments = ["--iterations", "2", "--ways", "2", "--output", str(tmp_path / "task.png")]
    options = ["--data", str(tmp_path), "--algorithm", algorithm]
    assert main(["demo", "omniglot", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert f"{ALGORITHMS[algorithm][0]}  2/2" in printed
    assert "of the query images right" in printed


def test_omniglot_as_a_person_runs_it(tmp_path):
    write_zips(tmp_path, alphabets=3, characters=6, drawings=2)
    printed = run(tmp_path, "omniglot", "--data", ".", "--iterations", "3", "--ways", "2")
    assert "3/3" in printed
    assert "validation accuracy" in printed
    assert "2-way 1-shot, mlp:" in printed
    assert "after 1 inner step" in printed
    assert (tmp_path / "fastmeta-omniglot.png").read_bytes().startswith(PNG)


def test_time_limit_ends_training(tmp_path, capsys, monkeypatch):
    write_zips(tmp_path, alphabets=3, characters=6, drawings=2)
    monkeypatch.setattr("fastmeta.demo.omniglot.TEST_TASKS", 4)
    monkeypatch.setattr("fastmeta.demo.omniglot.VALIDATION_TASKS", 4)
    options = ["--data", str(tmp_path), "--ways", "2", "--minutes", "0.001"]
    assert main(["demo", "omniglot", *options, "--output", str(tmp_path / "t.png")]) == 0
    steps = int(capsys.readouterr().out.split(" meta-steps")[0].split()[-1])
    assert 1 <= steps < 20_000


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a demonstration that can't run; returns its complaint."""
    assert main(["demo", *arguments]) == 2
    out, complaint = capsys.readouterr()
    assert out == ""
    assert complaint.startswith("fastmeta demo: ")
    assert "Traceback" not in complaint
    return complaint


@pytest.mark.parametrize("given", [[], ["--data", "nowhere"]], ids=["no path", "no data"])
def test_missing_data_says_where_to_get_it(capsys, given):
    complaint = refused(capsys, "omniglot", *given)
    assert "github.com/brendenlake/omniglot" in complaint
    assert "images_background.zip" in complaint


def test_too_little_data_is_refused_before_training(capsys, tmp_path):
    write_zips(tmp_path, alphabets=3, characters=6, drawings=2)
    complaint = refused(capsys, "omniglot", "--data", str(tmp_path), "--ways", "2", "--shots", "2")
    assert "shots + queries: 2 + 1 = 3, but class 0 has only 2 examples" in complaint
    complaint = refused(capsys, "omniglot", "--data", str(tmp_path), "--ways", "30")
    assert "ways: 30, but there are only" in complaint


def test_damaged_data_is_named(capsys, tmp_path):
    (tmp_path / f"{BACKGROUND}.zip").write_bytes(b"not a zip file")
    complaint = refused(capsys, "omniglot", "--data", str(tmp_path))
    assert f"{BACKGROUND}.zip: not a readable zip file" in complaint


def test_options_of_the_other_demonstration_are_refused(capsys):
    assert "--test-steps belongs to" in refused(capsys, "sinusoid", "--test-steps", "3")


def test_output_folder_must_exist(capsys):
    assert "there is no folder" in refused(capsys, "--output", "nowhere/picture.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_device_is_named(capsys):
    assert "--device: cuda can't be used here" in refused(capsys, "--device", "cuda")


def test_missing_packages_say_what_to_install(capsys, monkeypatch):
    absent = lambda name: None if name == "matplotlib" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(command, "find_spec", absent)
    complaint = refused(capsys)
    assert 'take matplotlib: pip install "fastmeta[demo]"' in complaint


@pytest.mark.parametrize(
    "bad", [["--iterations", "0"], ["--inner-lr", "-1"], ["--minutes", "nan"], ["mnist"]]
)
def test_bad_values_end_with_the_usage(capsys, bad):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *bad])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err
