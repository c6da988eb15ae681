"""The layered step by Triton on a GPU: what only a device can show. Skipped where there is none.

Needs TRITON_INTERPRET=0: elsewhere the tests leave Triton's kernels to its interpreter.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta

LIVE = torch.cuda.is_available() and fastmeta.backends()["layered-triton"].live
pytestmark = pytest.mark.skipif(not LIVE, reason="Triton has no GPU here")

OPTIONS: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2, "executor": "layered"}
ROUNDING = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A first block of one channel, one of multiples of 16, a strided one without pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(20, 3),
    ).to("cuda", dtype)  # fmt: skip


def data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(3, n, 1, 13, 14).to("cuda", dtype), torch.randint(3, (3, n)).cuda())
        for n in (4, 5)
    ]


def step(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    out = fastmeta.maml_step(model, *batch, **OPTIONS)
    assert out.executor == "layered-triton"
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]


def on_processor(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The same by autograd in float64."""
    model = copy.deepcopy(model).double().cpu()
    there = [(x.double().cpu(), y.cpu()) for x, y in batch]
    out = fastmeta.maml_step(model, *there, **{**OPTIONS, "executor": "generic"})
    return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-11)


def test_it_agrees_with_the_processor_and_repeats_its_bits() -> None:
    model, batch = network(), data()
    found = step(model, batch)
    assert all(map(torch.equal, found, step(model, batch)))
    close(found, on_processor(model, batch))


@pytest.mark.parametrize("setting", ROUNDING)
def test_float32_by_torchs_switches(setting: str) -> None:
    model, batch = network(torch.float32), data(torch.float32)
    torch.set_float32_matmul_precision(setting)
    try:
        found = step(model, batch)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = on_processor(model, batch)
    ours, theirs = (torch.cat([g.flatten().cpu().double() for g in x]) for x in (found, expected))
    assert (ours - theirs).norm() <= 64 * ROUNDING[setting] * theirs.norm()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_it_never_waits_for_the_device() -> None:
    model, batch = network(), data()
    step(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays_on_new_data_and_parameters() -> None:
    model = network()
    maml = fastmeta.MAML(model, capture=True, **OPTIONS)
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
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, found, expected))
