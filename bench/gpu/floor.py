"""What a step on a GPU can't go below, by count."""

from __future__ import annotations

import math

import torch
from torch import nn

from bench import operations
from bench.workloads import Workload

LANES = 128
"""Multiply-adds of a multiprocessor in one clock, float32, from sm_86 on; sm_80 has 64."""
CLOCK = 1.98e9
"""Of an H200 at work, 1/s."""
BANDWIDTH = 4.8e12
"""Of its memory, bytes/s."""


def milliseconds(workload: Workload, model: nn.Module, multiprocessors: int) -> float:
    """The longer of arithmetic and memory: a task is on one multiprocessor, data is read once."""
    widths = [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    widths.append(workload.classes or 1)
    forms = [
        operations.of_step(
            widths, 1, workload.support, workload.query, workload.steps, dual=dual
        )
        for dual in (False, True)
    ]  # fmt: skip
    rounds = math.ceil(workload.tasks / multiprocessors)
    arithmetic = rounds * min(forms) / (2 * LANES * CLOCK)
    data = workload.tasks * (workload.support + workload.query) * math.prod(workload.shape)
    parameters = sum(p.numel() for p in model.parameters())
    memory = 4 * (data + 2 * parameters) / BANDWIDTH
    return 1e3 * max(arithmetic, memory)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
