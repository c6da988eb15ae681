"""The convolutional step over drawn networks, losses and options, in float64, by the oracle.

`make fuzz` draws 2,000, new ones each time; the tests draw 60, the same ones each time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import drawn_steps
import pytest
import torch
from drawn_steps import Case
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta

extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")


class Steep(nn.Module):
    """An activation that has no name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))
CLASSES = 3

ACTIVATIONS: dict[str, list[Callable[[], nn.Module]]] = {
    "none": [], "relu": [nn.ReLU], "leaky": [lambda: nn.LeakyReLU(0.3)], "tanh": [nn.Tanh],
    "silu": [nn.SiLU], "falling": [lambda: nn.LeakyReLU(-0.3)], "steep": [Steep],
}  # fmt: skip
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
# One draws what Winograd's transforms serve, one everything.
convolutions = st.one_of(
    st.fixed_dictionaries(
        {"out_channels": st.sampled_from([1, 16, 20]), "kernel_size": st.just(3),
         "padding": st.just(1), "bias": st.booleans()}
    ),
    st.fixed_dictionaries(
        {"out_channels": st.integers(1, 9), "kernel_size": pairs, "stride": pairs,
         "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
         "dilation": st.integers(1, 2), "bias": st.booleans()}
    ),
)  # fmt: skip
followed = st.tuples(
    convolutions,
    st.sampled_from(["none", "batch", "batch", "running"]),
    st.sampled_from([*ACTIVATIONS]),
    st.integers(-3, 3),
    st.sampled_from(["none", "none", "identity", "projection"]),
)


def image(case: Case) -> tuple[int, int, int]:
    return case.widths[0], 4 + case.seed % 11, 4 + case.seed // 11 % 11


class Sum(nn.Module):
    """A convolution and its norm, beside its input or a projection of that."""

    def __init__(self, x: Tensor, options: dict[str, Any], norm: str, projects: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(x.shape[1], **options).double()
        h = self.convolution(x)
        self.norm = make_norm(h.shape[1], norm, options["bias"])
        self.project: nn.Module = nn.Identity()
        if projects or h.shape != x.shape:
            projection = nn.Conv2d(x.shape[1], **options).double()
            self.project = nn.Sequential(
                projection, make_norm(h.shape[1], norm, options["bias"]), nn.ReLU()
            )

    @property
    def weight(self) -> Tensor:
        """As a convolution has it."""
        return self.convolution.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) + self.norm(self.convolution(x))


def network(case: Case, drawn: list[Any]) -> nn.Sequential:
    """Blocks as far as the image lasts, then a mean or none, then a linear layer."""
    layers: list[nn.Module] = []
    x = torch.zeros(2, *image(case)).double()
    for options, norm, activation, pool, shortcut in drawn:
        try:
            if shortcut == "none":
                convolution = nn.Conv2d(x.shape[1], **options).double()
                parts = [convolution, make_norm(convolution(x).shape[1], norm, options["bias"])]
            else:
                parts = [Sum(x, options, norm, shortcut == "projection" or not layers)]
        except RuntimeError:  # the kernel is larger than what is left
            continue
        x = copy.deepcopy(nn.Sequential(*parts)).eval()(x)
        layers += parts
        behind = [make() for make in ACTIVATIONS[activation]]
        if 1 < abs(pool) <= min(x.shape[2:]):
            maximum = nn.MaxPool2d(abs(pool))
            behind.insert(pool > 0 and len(behind), maximum)  # behind the activation, or before it
            x = maximum(x)
        layers += behind
    if not layers:
        layers = [nn.Conv2d(case.widths[0], 2, 1).double()]
        x = torch.zeros(2, 2, *image(case)[1:])
    if case.ends_in_activation:
        layers.append(nn.AdaptiveAvgPool2d(1))
        x = x.mean((2, 3))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), CLASSES)).double()
    if case.frozen:
        model[0].requires_grad_(False)
    return model


def make_norm(width: int, kind: str, affine: bool) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    # A large epsilon, or two pixels that are nearly alike would magnify every rounding error.
    norm = nn.BatchNorm2d(width, eps=0.125, affine=affine).double()
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked += 1  # or they would count as never written
    return norm.train(kind == "batch")


@settings(
    max_examples=CASES or 60, derandomize=CASES == 0, deadline=None, print_blob=True,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(
    case=drawn_steps.cases,
    blocks=st.lists(followed, min_size=1, max_size=3),
    tasks=st.sampled_from([1, 2, 3, 17]),
    threads=st.sampled_from([1, 2]),
    isa=st.sampled_from(extension.instruction_sets()),
)
def test_drawn_networks_agree_with_the_oracle(
    case: Case, blocks: list[Any], tasks: int, threads: int, isa: str, monkeypatch
) -> None:
    case = replace(
        case, widths=[case.widths[0], CLASSES], norm="batch", tasks=tasks,
        steps=case.steps % 3,
    )  # fmt: skip
    make: Callable[[Case], nn.Sequential] = lambda case: network(case, blocks)  # noqa: E731
    drawn = drawn_steps.draw(case, make, image(case))
    leaves = drawn.leaves()
    expected = drawn.reference(drawn_steps.loss_function(case))
    monkeypatch.setenv("FASTMETA_ISA", isa)
    torch.set_num_threads(threads)
    try:
        out = fastmeta.maml_step(
            drawn.model, drawn.support, drawn.query, executor="layered", **drawn.options()
        )
    finally:
        torch.set_num_threads(1)
    assert out.executor == "layered-cpu"
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    pairs = zip(gradients, expected.gradients, leaves, strict=True)
    apart = 0.0
    for ours, theirs, leaf in pairs:
        ours, theirs = (torch.zeros_like(leaf) if g is None else g for g in (ours, theirs))
        apart = max(apart, float((ours - theirs).norm() / theirs.norm().clamp(min=1e-2)))
    note(f"{drawn.model}, {isa}: gradients apart by {apart:.3g}")
    assert apart < 1e-10
    torch.testing.assert_close(out.task_losses, expected.task_losses)
    for ours, theirs in zip(out.query_outputs, expected.query_outputs, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
