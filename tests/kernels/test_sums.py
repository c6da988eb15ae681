"""The sum over tasks: any number of them, in an order that does not change."""

from __future__ import annotations

import pytest
import torch
import triton_on_host  # noqa: F401

from fastmeta.kernels import launch


@pytest.mark.parametrize(("tasks", "count"), [(1, 1), (33, 65), (100, 7)])
def test_a_weighted_sum(tasks: int, count: int) -> None:
    stride, start = count + 3, 5
    buffer = torch.randn(start + tasks * stride, dtype=torch.float64)
    weights = torch.rand(tasks, dtype=torch.float64)
    out = torch.full((count,), torch.nan, dtype=torch.float64)
    launch.sum_tasks(out, buffer, weights, start, stride)
    expected = weights @ buffer[start:].view(tasks, stride)[:, :count]
    torch.testing.assert_close(out, expected)
