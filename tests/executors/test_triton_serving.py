"""What Triton's step declines, and what `info` and `explain` tell of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import triton_on_host  # noqa: F401
from mlps import examples, mlp
from torch import Tensor, nn

import fastmeta
from fastmeta.executors.fused import engines
from fastmeta.executors.fused.operations import serving
from fastmeta.plan import trial

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    monkeypatch.setenv("FASTMETA_TRITON_ON_HOST", "1")
    # The trial beside the loop would take as long again.
    monkeypatch.setattr(trial, "failure", lambda *_: None)


def drawn() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    model = mlp(3, 4, 2, activation=nn.Tanh())
    return model, examples(2, 3, model, True), examples(2, 4, model, True)


def test_memory_flat_in_steps_is_declined_with_the_reason() -> None:
    with pytest.raises(ValueError, match="keeps every inner step"):
        fastmeta.maml_step(*drawn(), inner_steps=2, memory="low", executor="fused")


def test_first_order_keeps_one_step_and_takes_low_memory() -> None:
    out = fastmeta.maml_step(
        *drawn(), inner_steps=2, memory="low", first_order=True, executor="fused"
    )
    assert out.executor == "fused-triton-on-host"


def test_the_engine_that_runs_is_the_one_that_was_tried(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FASTMETA_TRITON_ON_HOST", "1")

    def another(*_) -> None:
        raise AssertionError("the trial's single step went to the CUDA kernels")

    def too_many_steps(problem, _) -> str | None:
        return "too many steps" if problem.inner.steps > 1 else None

    monkeypatch.setattr(engines, "_not_cuda", too_many_steps)
    monkeypatch.setattr(engines.cuda, "kernel", another)
    out = fastmeta.maml_step(*drawn(), inner_steps=2, executor="fused")
    assert out.executor == "fused-triton-on-host"


def test_no_graph_is_recorded_of_it(monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_ON_HOST", "1")  # a device that graphs are for
    model, support, query = drawn()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # the interpreter has some of its own
        out = fastmeta.MAML(model, capture=True)(support, query)
    assert out.executor == "fused-triton-on-host"
    assert any("would not keep the table of Triton's step" in str(w.message) for w in seen)


def test_matrices_that_pass_the_device_memory_are_declined_with_the_bytes(monkeypatch) -> None:
    monkeypatch.setattr(serving, "memory", lambda _: 1000)
    with pytest.raises(ValueError, match=r"its matrices take [\d,]+ bytes, cpu has 1,000"):
        fastmeta.maml_step(*drawn(), executor="fused")
    assert fastmeta.maml_step(*drawn()).executor == "generic"


def test_backends_tell_what_is_live_and_what_is_missing(monkeypatch) -> None:
    assert fastmeta.backends()["fused-triton"].live
    monkeypatch.delenv("FASTMETA_TRITON_ON_HOST")
    if torch.version.cuda is None:
        assert fastmeta.backends()["fused-triton"].detail == "this torch has no CUDA"
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = fastmeta.backends()["fused-triton"]
    assert missing.detail == "Triton is not installed"
    assert not missing.live
    assert missing.remedy


def test_without_triton_the_package_is_whole(tmp_path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastmeta\n"
        "data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in 'sq']\n"
        "assert fastmeta.maml_step(torch.nn.Linear(3, 2), *data).executor\n"
        "assert not fastmeta.backends()['fused-triton'].live"
    )
    environment = {k: v for k, v in os.environ.items() if k != "FASTMETA_TRITON_ON_HOST"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_a_plan_in_words() -> None:
    assert "Triton, one program a task" in fastmeta.explain(*drawn(), inner_steps=1)
