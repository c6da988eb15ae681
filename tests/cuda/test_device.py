"""The fused step on a GPU: what only a device can show. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from mlps import examples, mlp
from torch import Tensor, nn

import fastmeta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def network(device: str = "cuda") -> nn.Module:
    return mlp(3, 20, 2, activation=nn.Tanh()).to(device)


def data(device: str = "cuda", tasks: int = 7) -> list[tuple[Tensor, Tensor]]:
    drawn = [examples(tasks, n, mlp(3, 20, 2, activation=nn.Tanh()), True) for n in (4, 5)]
    return [(x.to(device), y.to(device)) for x, y in drawn]


def step(model: nn.Module, batch, **options) -> list[Tensor]:
    out = fastmeta.maml_step(model, *batch, inner_steps=3, executor="fused", **options)
    assert out.executor == "fused-cuda"
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_it_agrees_with_the_processor_and_repeats_its_bits(form: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTMETA_FORM", form)
    model, batch = network(), data()
    found = step(model, batch)
    assert all(map(torch.equal, found, step(model, batch)))
    out = fastmeta.maml_step(
        model.cpu(), *[(x.cpu(), y.cpu()) for x, y in batch], inner_steps=3, executor="generic"
    )
    close(found, [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))])


def test_tf32_where_torch_says_so() -> None:
    model, batch = network().float(), [(x.float(), y) for x, y in data()]
    plain = step(model, batch)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = step(model, batch)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, step(model, batch), plain))
    assert not any(map(torch.equal, rounded, plain))
    # 2 layers, 3 steps forward and back, operands rounded by half of 2^-10.
    for a, b in zip(rounded, plain, strict=True):
        assert (a - b).norm() <= 2 * 2 * 3 * 2.0**-10 * b.norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_it_never_waits_for_the_device() -> None:
    model, batch = network(), data()
    step(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batch)
        step(model, batch, inner_lr=torch.tensor(0.1, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream() -> None:
    model, batches = network(), [data(), data()]
    expected = [step(model, batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []
    for _ in range(20):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(model, batch))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_graph_replays_on_new_data_and_parameters() -> None:
    model = network()
    maml = fastmeta.MAML(model, inner_steps=3, executor="fused", capture=True)
    for _ in range(3):
        batch = data()
        out = maml(*batch)
        found = [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]
        close(found, step(model, batch))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)


def test_maml_step_can_be_recorded_by_its_caller() -> None:
    model, batch = network(), data()
    expected = step(model, batch)
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(model, batch)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        found = step(model, batch)
    step(model, batch, inner_lr=0.3)  # which throws away what is kept for 0.01
    torch.full((1 << 20,), torch.nan, device="cuda")
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_a_label_that_is_no_class_makes_its_task_no_number() -> None:
    model, ((sx, sy), query) = network(), data()
    step(model, ((sx, sy), query))
    for label in (-1, 2, 1 << 40):
        wrong = sy.clone()
        wrong[1, 2] = label
        out = fastmeta.maml_step(model, (sx, wrong), query, executor="fused")
        assert out.task_losses.isnan().tolist() == [i == 1 for i in range(7)]


def test_what_does_not_fit_lies_in_device_memory_or_is_left_to_the_general_path() -> None:
    for width, executor in ((300, "fused-cuda"), (600, "generic")):
        model = mlp(width, width, width, 2, activation=nn.Tanh())
        x, y = examples(2, 4, model, True)
        batch = [(x.to("cuda"), y.to("cuda"))] * 2
        model.to("cuda")
        out = fastmeta.maml_step(model, *batch)
        assert out.executor == executor
        other = fastmeta.maml_step(model, *batch, executor="generic")
        close([out.loss.detach()], [other.loss.detach()])
        assert "memory" in fastmeta.explain(model, *batch)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
def test_it_runs_where_its_tensors_are() -> None:
    torch.manual_seed(0)
    model, batch = network(), data()
    expected = step(model, batch)
    there = [(x.to("cuda:1"), y.to("cuda:1")) for x, y in batch]
    close(step(model.to("cuda:1"), there), expected)
    assert torch.cuda.current_device() == 0
