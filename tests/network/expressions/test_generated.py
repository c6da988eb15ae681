"""What is generated from the table of operations, or numbered as in C++, is current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmeta.network.expressions import generate
from fastmeta.network.expressions.derivatives import jet
from fastmeta.network.expressions.expression import spread
from fastmeta.network.expressions.program import NUMBERS, Matrix, program
from fastmeta.network.expressions.tracing import EXAMPLES, Symbol, Trace
from fastmeta.network.layers.elementwise import ENTRY


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x * torch.sigmoid(1.7 * x), 13),
        (lambda x: torch.exp(-x * x), 7),
        (lambda x: torch.sin(30 * x), 5),
    ],
)
def test_the_instructions_of_an_activation(function: Any, count: int) -> None:
    traced = function(Symbol(ENTRY, (EXAMPLES,), Trace(torch.float64))).expression
    results = [(spread(e, True, 1), Matrix(i)) for i, e in enumerate(jet(traced, ENTRY), 1)]
    assert len(program(results, {ENTRY: Matrix(0)}).code[1]) == count


def test_a_sigmoid_is_computed_with_one_partner() -> None:
    x = Symbol(ENTRY, (EXAMPLES,), Trace(torch.float64))
    traced = (F.softplus(x) + F.mish(x) + torch.sigmoid(x)).expression
    code = program([(spread(traced, True, 1), Matrix(1))], {ENTRY: Matrix(0)}).code[1]
    names = [[*NUMBERS][number] for number, *_ in code]
    assert sum("sigmoid" in name for name in names) == 1


def test_the_header_is_current() -> None:
    header = Path(__file__).parents[3] / "csrc" / "operations.h"
    assert header.read_text(encoding="utf-8") == generate.header()


def test_the_extension_numbers_its_operations_alike() -> None:
    extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    assert extension.operations() == [*NUMBERS]
