"""What torch's switches for matrix products ask for, by their old names and their new."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from fastmeta.precision import of_products


@pytest.fixture(autouse=True)
def _switched_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")]
)
def test_the_older_switch(setting: str, precision: str) -> None:
    torch.set_float32_matmul_precision(setting)
    assert of_products(torch.float32) == precision
    assert of_products(torch.float64) == "ieee"


@pytest.mark.parametrize(
    ("switches", "precision"),
    [
        (types.SimpleNamespace(fp32_precision="tf32"), "tf32"),
        (types.SimpleNamespace(fp32_precision="none"), "ieee"),
        (types.SimpleNamespace(allow_tf32=True), "tf32"),  # torch before 2.9
        (types.SimpleNamespace(allow_tf32=False), "ieee"),
    ],
)
def test_the_newer_switch_and_torch_without_it(switches, precision: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", switches)
    assert of_products(torch.float32) == precision


def test_where_the_older_switch_has_no_word_for_the_newer(monkeypatch) -> None:
    def mixed() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(fp32_precision="tf32"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert of_products(torch.float32) == "tf32"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has no new names"
)
def test_the_newer_switches_themselves() -> None:
    """In a process of its own: torch forbids to mix them with the older, and remembers."""
    code = """
import torch
from fastmeta.precision import of_products
assert of_products(torch.float32) == "ieee"
torch.backends.fp32_precision = "tf32"
assert of_products(torch.float32) == "tf32"
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert of_products(torch.float32) == "ieee"
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert of_products(torch.float32) == "tf32"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
