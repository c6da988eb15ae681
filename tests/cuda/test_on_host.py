"""The whole oracle suite of the fused step through the CUDA kernels, and their faults."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import compiling
import host_cuda
import pytest
import torch
from mlps import examples, mlp
from torch import nn

import fastmeta
from bench.workloads import WORKLOADS
from fastmeta.executors.fused import cuda
from fastmeta.plan import snapshot, verification

pytestmark = pytest.mark.skipif(compiling.COMPILER is None, reason="there is no C++ compiler here")


@pytest.mark.timeout(1800)
def test_the_oracle_suite_passes() -> None:
    host_cuda.build()
    tests = Path(__file__).parent.parent / "executors"
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(tests.glob("test_*.py"))}
    of_chains = [
        str(file)
        for file, text in texts.items()
        if ("fused_kernels" in text or "host_cuda" in text)
        and "pytestmark = cpu_only" not in text
        and "layered" not in file.name
    ]
    # -P: the package under test, not the source tree beside the tests.
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", *of_chains, "-p", "no:cacheprovider"],
        env={**os.environ, "FASTMETA_CUDA_ON_HOST": "1"}, cwd=tests.parent.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout[-4000:]
    assert int(passed[1]) > 300  # rather than skipped


def step(model: nn.Module, **options) -> fastmeta.MetaStep:
    data = [examples(3, n, model, True) for n in (4, 5)]
    return fastmeta.maml_step(model, *data, executor="fused", **options)


@pytest.mark.parametrize("fault", ["launch", "shared"])
def test_a_refused_launch_names_its_cause_and_touches_no_gradient(
    fault: str, cuda_plays, monkeypatch
) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    step(model).loss.backward()  # planned, and trusted since
    before = [p.grad.clone() for p in model.parameters()]
    monkeypatch.setenv("FASTMETA_CUDA_FAIL", fault)
    with pytest.raises(RuntimeError, match=r"can't run on cpu: (launch|shared memory) of"):
        step(model)
    monkeypatch.delenv("FASTMETA_CUDA_FAIL")
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert step(model).executor == "fused-cuda-on-host"


def test_what_does_not_fit_lies_in_device_memory(cuda_plays, monkeypatch) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    found = []
    for limit, where in ((100_000, "shared"), (1000, "device")):
        monkeypatch.setenv("FASTMETA_CUDA_SHARED", str(limit))
        snapshot.clear_cache()
        assert f"a task a block in {where} memory" in fastmeta.explain(model, *data)
        found.append(fastmeta.maml_step(model, *data, executor="fused").loss)
    assert torch.equal(*found)


def test_wide_layers_that_do_not_fit_are_declined_with_the_bytes(cuda_plays) -> None:
    model = mlp(3, 513, 513, 2, activation=nn.Tanh())
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes of shared memory, .* wider than 512"):
        step(model)


def test_without_memory_no_gradient_is_touched(cuda_plays, monkeypatch) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    step(model).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]

    def refuse(*_: object, **__: object):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", refuse)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            step(model)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert step(model).executor == "fused-cuda-on-host"


def test_what_a_graph_records_is_its_own(cuda_plays, monkeypatch) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    options = {"inner_steps": 2, "step_weights": [0.2, 0.0, 0.8]}
    torch.manual_seed(0)
    plain = [step(model, inner_lr=rate, **options).loss for rate in (0.1, 0.2)]
    monkeypatch.setattr(cuda, "capturing", lambda device: True)
    torch.manual_seed(0)
    kept = len(cuda._in_graphs)
    assert [step(model, inner_lr=rate, **options).loss for rate in (0.1, 0.2)] == plain
    assert len(cuda._in_graphs) == kept + 1


def test_without_a_driver_the_next_executor_serves(cuda_plays, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_CUDA_FAIL", "driver")
    model = mlp(3, 5, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    assert fastmeta.maml_step(model, *data).executor == "layered-torch"
    assert "CUDA driver version is insufficient" in fastmeta.explain(model, *data)


def test_a_label_that_is_no_class_makes_its_task_no_number(cuda_plays) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    (sx, sy), query = (examples(3, n, model, True) for n in (4, 5))
    fastmeta.maml_step(model, (sx, sy), query, executor="fused")
    wrong = sy.clone()
    wrong[1, 2] = 7
    out = fastmeta.maml_step(model, (sx, wrong), query, executor="fused")
    assert torch.equal(out.task_losses.isnan(), torch.tensor([False, True, False]))


def test_the_inner_loop_runs_backward_where_that_leaves_fewer_tasks_after_each_other(
    cuda_plays,
) -> None:
    """As docs/design.md has it of W1b and W1c."""
    model = mlp(1, 40, 40, 1, activation=nn.ReLU()).float()

    def words(tasks: int) -> str:
        data = [(torch.randn(tasks, 10, 1), torch.randn(tasks, 10, 1)) for _ in "sq"]
        return fastmeta.explain(model, *data, inner_steps=5, loss_fn=nn.functional.mse_loss)

    assert "25 blocks of 128 threads" in words(25)
    assert "inner loop saved" in words(25)
    assert "264 blocks of 128 threads" in words(264)
    assert "inner loop saved" in words(264)
    assert "396 blocks of 128 threads" in words(1000)
    assert "inner loop reversible" in words(1000)


@pytest.mark.parametrize(
    ("name", "size"), [("W1b", 97_280), ("W2", 183_360), ("W2b", 231_936), ("W4", 132_432)]
)
def test_a_task_takes_as_many_bytes_as_the_document_says(name: str, size: int, cuda_plays) -> None:
    workload = WORKLOADS[name].with_tasks(1)
    words = fastmeta.explain(*workload.make(), inner_steps=workload.steps, loss_fn=workload.loss_fn)
    assert "a task a block in shared memory" in words
    assert f"{size:,} bytes" in words


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_the_same_bits_every_run(form: str, cuda_plays, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", form)
    model = mlp(6, 5, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    found = []
    for seed in (1, 2, 3):
        monkeypatch.setenv("FASTMETA_CUDA_SEED", str(seed))
        out = fastmeta.maml_step(model, *data, executor="fused")
        found.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


def test_several_tasks_a_block_and_every_size_of_it(cuda_plays, monkeypatch) -> None:
    model = mlp(2, 3, 2, activation=nn.Tanh())
    data = [examples(100, n, model, True) for n in (2, 3)]
    losses = []
    monkeypatch.setenv("FASTMETA_CUDA_MULTIPROCESSORS", "2")
    for threads, blocks in (("32", 24), ("256", 2)):
        monkeypatch.setenv("FASTMETA_CUDA_THREADS", threads)
        snapshot.clear_cache()
        assert f"{blocks} blocks of {threads} threads" in fastmeta.explain(model, *data)
        out = fastmeta.maml_step(model, *data, executor="fused")
        losses.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))])
    other = fastmeta.maml_step(model, *data, executor="generic")
    expected = [other.loss, *torch.autograd.grad(other.loss, list(model.parameters()))]
    for found in losses:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture
def not_built(cuda_plays, monkeypatch) -> None:
    """The host plays a GPU for which no CUDA kernels were built."""
    monkeypatch.setattr(host_cuda.FusedCudaOnHost, "module", lambda _: None)


def test_without_the_cuda_kernels_the_layers_rules_serve_perceptrons(not_built) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    words = fastmeta.explain(model, *data)
    assert "kernel: torch's operators" in words
    assert "not fused: the CUDA kernels are not there; `python -m fastmeta info` says why" in words
    out = fastmeta.maml_step(model, *data, inner_lr=0.1, inner_steps=2)
    assert out.executor == "layered-torch"
    loop = fastmeta.maml_step(model, *data, inner_lr=0.1, inner_steps=2, executor="generic")
    leaves = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(loop.loss, leaves)
    )


def test_asked_for_the_missing_cuda_kernels_are_named(not_built) -> None:
    with pytest.raises(ValueError, match="'fused' can't serve: the CUDA kernels are not there"):
        step(mlp(3, 5, 2, activation=nn.Tanh()))


def test_what_the_layers_rules_fail_at_goes_to_the_general_path(not_built, monkeypatch) -> None:
    model = mlp(3, 5, 2, activation=nn.Tanh())
    data = [examples(3, n, model, True) for n in (4, 5)]
    monkeypatch.setattr(verification, "failure", lambda *_: "it disagrees with autograd")
    assert fastmeta.maml_step(model, *data).executor == "generic"
