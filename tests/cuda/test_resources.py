"""What the CUDA compiler says of the kernels: no spills, registers for a whole block."""

from __future__ import annotations

import importlib
import json

import pytest

from fastmeta.backends import BUILD_RECORD

REGISTERS = 64 << 10
"""Of a multiprocessor, of every architecture from sm_80 to sm_100."""
THREADS = 256
"""Of the largest block: csrc/cuda/step.h."""


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    record = json.loads(BUILD_RECORD.read_text()).get("cuda", {})
    if not record.get("built"):
        pytest.skip(f"the CUDA kernels were not built here: {record.get('reason')}")
    return record["resources"]


def test_nothing_is_spilled(resources) -> None:
    assert {name: found["spilled"] for name, found in resources.items()} == dict.fromkeys(
        resources, 0
    )


def test_the_largest_block_finds_its_registers(resources) -> None:
    for found in resources.values():
        assert 0 < found["registers"] * THREADS <= REGISTERS


def test_the_module_loads_without_a_driver(resources) -> None:
    module = importlib.import_module("fastmeta._cuda")
    assert [f"sm_{a}" for a in module.architectures().split(";")] == [*resources]
