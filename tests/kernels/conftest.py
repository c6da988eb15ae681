"""Triton's kernels on the host, by its interpreter; on a GPU with FASTMETA_TEST_DEVICE=cuda and
TRITON_INTERPRET=0, as bench/gpu.sh has those of the convolutions."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """Where tensors are made."""
    with torch.device(os.environ.get("FASTMETA_TEST_DEVICE", "cpu")):
        yield
