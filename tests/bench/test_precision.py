"""Float32 errors of the layers' rules and of the compiled steps beside the plain loop's.

The bound is what is promised; medians, because one turned corner of a ReLU or of a maximum is
chance (`bench/precision.py`). What lost digits here lost 50 to 500 times the loop's.
"""

from __future__ import annotations

from statistics import median

import pytest

from bench import precision

DRAWS = 5


@pytest.mark.parametrize(
    "name",
    [
        "bias 30, tanh", "blank, tanh, max pool", "blank, separable", "bias 30, group norm",
    ],
)  # fmt: skip
def test_rules_round_little_more_than_the_plain_loop(name: str) -> None:
    found = precision.errors(precision.CASES[name], DRAWS)
    allowed = precision.MOST * median(found[precision.LOOP])
    assert median(found[precision.RULES]) < allowed


def test_the_compiled_step_rounds_little_more_than_the_plain_loop() -> None:
    """A background of zeros, which a projection's gradient must not read as minus the mean."""
    found = precision.errors(precision.CASES["blank, ResNet"], DRAWS)
    allowed = precision.MOST * median(found[precision.LOOP])
    assert median(found[precision.COMPILED]) < allowed
