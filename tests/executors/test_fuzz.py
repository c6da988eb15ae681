"""The fused step over drawn networks, losses and options, in float64 and float32, by the oracle.

`make fuzz` draws 2,000, new ones each time; the tests draw 100, the same ones each time.
"""

from __future__ import annotations

import os

import drawn_steps
import pytest
import torch
from drawn_agreement import Corners, apart, compared, filled
from drawn_steps import Case
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

import fastmeta

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

from fused_kernels import DEVICE, FUSED, KERNELS

CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))


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
    if FUSED != "fused-cpu":  # of a GPU's kernels a later work
        assume(case.norm not in ("layer", "rms") and not case.residual)
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
