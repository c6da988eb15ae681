"""What is generated from the table of operations, or numbered as in C++, is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmeta.network.expressions import generate
from fastmeta.network.expressions.program import NUMBERS


def test_the_header_is_current() -> None:
    header = Path(__file__).parents[3] / "csrc" / "operations.h"
    assert header.read_text(encoding="utf-8") == generate.header()


def test_the_extension_numbers_its_operations_alike() -> None:
    extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    assert extension.operations() == [*NUMBERS]
