"""The GPU benchmark, as far as a machine without one can try it: its kernels run on the host."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import compiling
import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import floor, forms, small
from bench.peers.peer import Peer, into_grad
from bench.workloads import WORKLOADS

needs_compiler = pytest.mark.skipif(
    compiling.COMPILER is None, reason="there is no C++ compiler here"
)
SCRIPT = Path(gpu.__file__).parents[1] / "gpu.sh"


def test_the_script_is_valid() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@needs_compiler
def test_a_dry_run(cuda_plays, tmp_path, capsys) -> None:
    output = tmp_path / "gpu.json"
    gpu.main(
        ["--device", "cpu", "--only", "tiny", "--peers", "fastmeta", "plain loop", "torch.func",
         "supervised step", "--seconds", "0.05", "--output", str(output)]
    )  # fmt: skip
    last = capsys.readouterr().out.strip().splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[0] == "tiny"
    assert [cell == "–" for cell in cells[2:]] == [
        True,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
        False,
    ]
    records = json.loads(output.read_text())["results"]["tiny"]
    left_out = ("in a graph", "in a graph, TF32", "capture=True")
    assert {r["form"]: r["why"] for r in records if "why" in r} == dict.fromkeys(
        left_out, "CUDA graphs are a GPU's"
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_dry_run_of_the_layered_step(triton_plays, capsys) -> None:
    gpu.main(
        ["--device", "cpu", "--only", "tiny block", "--peers", "fastmeta", "plain loop",
         "--seconds", "0.05", "--limit", "200"]
    )  # fmt: skip
    last = capsys.readouterr().out.strip().splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert [cell == "–" for cell in cells[2:7]] == [True, True, True, False, False]
    assert torch.get_float32_matmul_precision() == "highest"


def test_launches_of_a_layered_step(triton_plays) -> None:
    """As docs/design.md has them; fewer tasks have fewer partial sums."""
    from bench import triton_layered

    found = triton_layered.counted(WORKLOADS["W5s"].with_tasks(2)).launches
    assert found["Triton"] == 81
    assert found["torch"] <= 198


def test_who_is_wrong_is_not_timed() -> None:
    def half(workload, model, support, query):
        step = forms.PEERS[1].forms["backward at end"](workload, model, support, query)
        return into_grad(model, lambda: step.call() / 2)

    workload = gpu.workloads()["tiny"]
    device = torch.device("cpu")
    (record,) = gpu.measure(workload, [Peer("half", {"a form": half})], device, 0.01, 60)
    assert "disagrees with float64 autograd by 5.0e-01" in record["why"]
    assert "ms" not in record


def test_a_form_with_tf32_products_is_checked_and_timed_with_them() -> None:
    found = []

    def form(workload, model, support, query):
        found.append(torch.get_float32_matmul_precision())
        return forms.PEERS[1].forms["backward at end"](workload, model, support, query)

    peer = Peer("a peer", {"in a graph, TF32": form})
    device, tiny = torch.device("cpu"), replace(gpu.workloads()["tiny"], name="tiny")
    (record,) = gpu.measure(tiny, [peer], device, 0.01, 60)
    assert found == ["highest", "high", "high"]
    assert record["error_tf32"] <= record["error"]  # a processor rounds no operands
    assert "ms" in record
    other = replace(tiny, name="another")
    assert gpu.measure(other, [peer], device, 0.01, 60) == []


def test_the_plain_loop_is_not_waited_for_over_many_tasks() -> None:
    many = replace(gpu.workloads()["tiny"], tasks=forms.MOST_LOOPED + 1)
    (record,) = gpu.measure(many, [forms.PEERS[1]], torch.device("cpu"), 0.01, 60)
    assert record["why"] == "not waited for above 100 tasks"


def test_a_floor_is_of_whole_rounds_of_tasks() -> None:
    known = gpu.workloads()
    model = known["W1b, T=25"].network()
    few, many = (floor.milliseconds(known[f"W1b, T={tasks}"], model, 132) for tasks in (25, 1))
    assert few == many
    # 10.0 GFLOP on all of them in TF32.
    strided = known["W5s, T=32"]
    assert floor.milliseconds(strided, strided.network(), 132) == pytest.approx(0.019, rel=0.03)
    # 796,000 multiply-adds a task on one multiprocessor of 132.
    assert few == pytest.approx(796_000 / (128 * 1.98e9) * 1e3, rel=0.03)


@needs_compiler
def test_the_small_steps_run(cuda_plays, capsys, monkeypatch) -> None:
    for name in ("FASTMETA_FORM", "FASTMETA_CUDA_THREADS", "FASTMETA_CUDA_STORAGE"):
        monkeypatch.setenv(name, "")  # and put back what it sets
    small.main("cpu")
    assert capsys.readouterr().out == "fused-cuda-on-host: done\n"
