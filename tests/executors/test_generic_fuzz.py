"""The forms of the general path over drawn networks, losses, rules and options, by the oracle."""

from __future__ import annotations

import os

import drawn_steps
import torch
from drawn_agreement import Corners, apart, compared, filled
from drawn_steps import Case
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

import fastmeta

CASES = int(os.environ.get("FASTMETA_FUZZ", "0"))


@settings(
    max_examples=CASES or 60, derandomize=CASES == 0, deadline=None, print_blob=True,
    suppress_health_check=[*HealthCheck],
)  # fmt: skip
@given(case=drawn_steps.cases, form=st.sampled_from(["loop", "vmap", "sweep", "layered-torch"]))
def test_drawn_steps_agree_with_the_oracle(case: Case, form: str, only, force_form) -> None:
    corners = Corners()
    drawn = drawn_steps.draw(case)
    watched = drawn.to(torch.float64)
    corners.watch(watched.model)
    reference = watched.reference(corners.watched(case))
    assume(corners.nearest > 1e-9)
    expected = compared(watched, reference, filled(reference.gradients, watched.leaves()))
    options = {"memory": "low"} if form == "sweep" else {}
    executor = "layered" if form == "layered-torch" else "generic"
    if executor == "generic":
        force_form(form)
    else:
        only(form)
        assume(case.norm != "batch" or not case.ragged)  # padding would count in its statistics
    out = fastmeta.maml_step(
        drawn.model, drawn.support, drawn.query, executor=executor, **options, **drawn.options()
    )
    leaves = drawn.leaves()
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    found = apart(compared(drawn, out, filled(list(gradients), leaves)), expected)
    note(f"apart by {found}")
    assert max(found.values()) <= 1e-8
