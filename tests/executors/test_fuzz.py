"""The fused step over drawn networks, losses and options, in float64 and float32, by the oracle.

`make fuzz` draws 2,000, new ones each time; the tests draw 100, the same ones each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import drawn_steps
import oracle
import pytest
import torch
from drawn_steps import Case, Drawn
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import DEVICE, FUSED, KERNELS

CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))


class Corners:
    """How near the reference comes to one of its corners, where rounding decides about a slope."""

    def __init__(self) -> None:
        self.nearest = float("inf")

    def see(self, distance: Tensor) -> None:
        # At zero itself, as after a unit that is off, every precision says the same.
        distance = distance.detach().abs()
        distance = distance[distance > 0]
        if distance.numel():
            self.nearest = min(self.nearest, float(distance.min()))

    def watch(self, model: nn.Sequential) -> None:
        for module in model:
            if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.ELU):
                module.register_forward_pre_hook(lambda _, z: self.see(z[0]))
            elif isinstance(module, nn.Softplus):
                corner = module.threshold / module.beta
                module.register_forward_pre_hook(lambda _, z, at=corner: self.see(z[0] - at))

    def watched(self, case: Case) -> Callable[[Any, Any], Tensor]:
        loss_fn = drawn_steps.loss_function(case)
        knee = {"huber": case.loss_option or 1.0, "smooth_l1": case.loss_option or 1.0, "l1": 0.0}

        def watching(prediction: Tensor, target: Tensor) -> Tensor:
            if case.loss in knee:
                self.see((prediction - target).abs() - knee[case.loss])
            return loss_fn(prediction, target)

        return watching


def compared(drawn: Drawn, out: Any, gradients: Any) -> dict[str, Tensor]:
    """Of a reference or a `MetaStep`: losses, outputs and gradients, each in one row of numbers."""
    if isinstance(out, oracle.Reference):
        support = [torch.stack(losses) for losses in out.support_losses if losses]
        outputs = out.query_outputs
    else:
        support, outputs = [*out.support_losses.T], [*out.query_outputs]
    own = sum(p.requires_grad for p in drawn.model.parameters())
    rows = {
        "loss": [out.loss],
        "task losses": [out.task_losses],
        "support losses": support,
        "query outputs": outputs,
        "parameters": gradients[:own],
        "rates and weights": gradients[own:],
    }
    return {name: flat(tensors) for name, tensors in rows.items()}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors] or [torch.zeros(0)])


def filled(gradients: list[Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| over |b|."""
    distances: dict[str, float] = {}
    for name, value in a.items():
        assert value.shape == b[name].shape, name
        distances[name] = float((value - b[name]).norm() / b[name].norm().clamp(min=1e-2))
    return distances


@settings(
    max_examples=CASES or 100, derandomize=CASES == 0, deadline=None, print_blob=True,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(
    case=drawn_steps.cases,
    single=st.booleans(),
    differentiate=st.sampled_from([True, True, True, False]),
    threads=st.sampled_from([1, 2]),
    kernel=st.sampled_from([*KERNELS]),
    form=st.sampled_from(["primal", "dual"]),
    memory=st.sampled_from(["saved", "reversible"]),
)
def test_drawn_steps_agree_with_the_oracle(
    case: Case,
    single: bool,
    differentiate: bool,
    threads: int,
    kernel: str,
    form: str,
    memory: str,
    monkeypatch,
) -> None:
    corners = Corners()
    exact = drawn_steps.draw(case)
    watched = exact.to(torch.float64)
    corners.watch(watched.model)
    reference = watched.reference(corners.watched(case))
    assume(corners.nearest > (1e-4 if single else 1e-11))
    expected = compared(watched, reference, filled(reference.gradients, watched.leaves()))
    # What rounding does to this very step is seen in what it does to autograd in float32.
    narrow = exact.to(torch.float32)
    rounded = narrow.reference(drawn_steps.loss_function(case, torch.float32))
    spread = max(
        apart(
            compared(narrow, rounded, filled(rounded.gradients, narrow.leaves())), expected
        ).values()
    )
    eps = torch.finfo(torch.float32).eps
    tolerance = (64 + 30 * spread / eps) * (eps if single else torch.finfo(torch.float64).eps)

    drawn = (narrow if single else exact).to(torch.float32 if single else torch.float64, DEVICE)
    chosen = {**KERNELS[kernel], "FASTMETA_FORM": form, "FASTMETA_MEMORY": memory}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(threads)
    try:
        with torch.set_grad_enabled(differentiate):
            out = fastmeta.maml_step(
                drawn.model, drawn.support, drawn.query, executor="fused", **drawn.options()
            )
    finally:
        torch.set_num_threads(1)
    assert out.executor == FUSED
    leaves = drawn.leaves()
    if differentiate:
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        got = compared(drawn, out, filled(list(gradients), leaves))
    else:
        got = compared(drawn, out, [])
        expected = {**expected, "parameters": torch.zeros(0), "rates and weights": torch.zeros(0)}
    found = apart(got, expected)
    note(f"apart by {found}, allowed {tolerance:.3g}")
    assert max(found.values()) <= tolerance
