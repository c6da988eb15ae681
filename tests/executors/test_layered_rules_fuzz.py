"""The layers' rules over drawn graphs, losses and options, in float64, by the oracle.

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
import torch.nn.functional as F
from drawn_steps import Case
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from mlps import ACTIVATIONS
from torch import Tensor, nn

import fastmeta

CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))
CLASSES = 3

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
convolutions = st.fixed_dictionaries(
    {"out_channels": st.sampled_from([2, 4, 6]), "kernel_size": pairs, "stride": pairs,
     "padding": st.one_of(st.just("valid"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
     "dilation": st.integers(1, 2), "groups": st.sampled_from([1, 1, 2]), "bias": st.booleans()}
)  # fmt: skip
alike = st.fixed_dictionaries(
    {"out_channels": st.just(0), "kernel_size": st.just(3), "padding": st.just("same"),
     "dilation": st.integers(1, 2), "groups": st.sampled_from([1, 2])}
)  # fmt: skip
stages = st.tuples(
    st.one_of(convolutions, alike),
    st.sampled_from(["none", "batch", "running", "group", "layer"]),
    st.sampled_from([*ACTIVATIONS]),
    st.sampled_from(["none", "max", "average", "adaptive"]),
)


class Stage(nn.Module):
    """Convolution, norm, activation and pooling; a sum with its input where the shapes allow it."""

    def __init__(self, x: Tensor, drawn: Any) -> None:
        super().__init__()
        options, norm, activation, self.pool = drawn
        width = x.shape[1]
        options = {**options, "out_channels": options["out_channels"] or width}
        if width % options["groups"]:
            options["groups"] = 1
        self.convolution = nn.Conv2d(width, **options).double()
        h = self.convolution(x)
        self.norm = make_norm(norm, h[0])
        self.activation = copy.deepcopy(ACTIVATIONS[activation])
        self.adds = h.shape == x.shape

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.convolution(x))
        if self.adds:
            h = h + x
        h = self.activation(h)
        if self.pool == "max":
            return F.max_pool2d(h, 3, stride=2, padding=1, ceil_mode=True)
        if self.pool == "average":
            return F.avg_pool2d(h, 3, stride=1, padding=1, count_include_pad=False)
        return F.adaptive_avg_pool2d(h, (2, 1)) if self.pool == "adaptive" else h


def make_norm(kind: str, h: Tensor) -> nn.Module:
    # A large epsilon, or two numbers that are nearly alike would magnify every rounding error.
    channels, eps = len(h), 0.125
    if kind == "none":
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels, eps).double()
    if kind == "layer":
        return nn.LayerNorm([*h.shape], eps).double()
    norm = nn.BatchNorm2d(channels, eps).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked += 1  # or they would count as never written
    return norm.train(kind == "batch")


def graph(case: Case, drawn: list[Any]) -> nn.Sequential:
    """Stages as far as the image lasts, then a mean or none, then a linear layer."""
    first = nn.Conv2d(case.widths[0], 4, 1).double()
    parts: list[nn.Module] = [first]
    x = first(torch.zeros(2, *image(case)).double())
    for each in drawn:
        try:
            stage = Stage(x, each)
        except RuntimeError:  # the kernel is larger than what is left
            continue
        parts.append(stage)
        x = copy.deepcopy(stage).eval()(x)
    if case.ends_in_activation:
        parts.append(nn.AdaptiveAvgPool2d(1))
        x = x.mean((2, 3))
    if case.frozen:
        parts[-1].requires_grad_(False)
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(x[0].numel(), CLASSES)).double()


def image(case: Case) -> tuple[int, int, int]:
    return case.widths[0], 3 + case.seed % 7, 3 + case.seed // 7 % 7


@settings(
    max_examples=CASES or 60, derandomize=CASES == 0, deadline=None, print_blob=True,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(
    case=drawn_steps.cases,
    drawn=st.lists(stages, min_size=1, max_size=3),
    tasks=st.integers(1, 4),
    low=st.booleans(),
    chunk=st.sampled_from([1, 1 << 30]),
)
def test_drawn_graphs_agree_with_the_oracle(
    case: Case, drawn: list[Any], tasks: int, low: bool, chunk: int, without,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    without("layered-cpu")
    monkeypatch.setattr("fastmeta.executors.layers.program._LARGEST", chunk)
    case = replace(
        case, widths=[case.widths[0], CLASSES], norm="batch", tasks=tasks, steps=case.steps % 4
    )
    make: Callable[[Case], nn.Sequential] = lambda case: graph(case, drawn)  # noqa: E731
    step = drawn_steps.draw(case, make, image(case))
    leaves = step.leaves()
    expected = step.reference(drawn_steps.loss_function(case))
    out = fastmeta.maml_step(
        step.model, step.support, step.query, executor="layered",
        memory="low" if low else "auto", **step.options(),
    )  # fmt: skip
    assert out.executor == "layered-torch"
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    apart = 0.0
    for ours, theirs, leaf in zip(gradients, expected.gradients, leaves, strict=True):
        left, right = (torch.zeros_like(leaf) if g is None else g for g in (ours, theirs))
        apart = max(apart, float((left - right).norm() / right.norm().clamp(min=1e-2)))
    note(f"{step.model}: gradients apart by {apart:.3g}")
    assert apart < 1e-9
    torch.testing.assert_close(out.task_losses, expected.task_losses)
