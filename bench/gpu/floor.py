"""What a step on a GPU can't go below, by count."""

from __future__ import annotations

import math

import torch
from torch import nn

from bench import convolutions, operations
from bench.workloads import Workload

LANES = 128
"""Multiply-adds of a multiprocessor in one clock, float32, from sm_86 on; sm_80 has 64."""
TF32 = 1024
"""Of its matrix units in TF32, sm_90; sm_80 has 512."""
CLOCK = 1.98e9
"""Of an H200 at work, 1/s."""
BANDWIDTH = 4.8e12
"""Of its memory, bytes/s."""


def milliseconds(workload: Workload, model: nn.Module, multiprocessors: int) -> float:
    """The longer of arithmetic and memory, where data is read once.

    Of a perceptron a task is on one multiprocessor; a convolution is on all, in TF32.
    """
    data = workload.tasks * (workload.support + workload.query) * math.prod(workload.shape)
    parameters = sum(p.numel() for p in model.parameters())
    memory = 4 * (data + 2 * parameters) / BANDWIDTH
    if workload.of_images:
        arithmetic = convolutions.operations(workload) / (2 * TF32 * CLOCK * multiprocessors)
    else:
        arithmetic = _in_rounds(workload, model, multiprocessors)
    return 1e3 * max(arithmetic, memory)


def _in_rounds(workload: Workload, model: nn.Module, multiprocessors: int) -> float:
    widths = [layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    widths.append(workload.classes or 1)
    forms = [
        operations.of_step(
            widths, 1, workload.support, workload.query, workload.steps, dual=dual
        )
        for dual in (False, True)
    ]  # fmt: skip
    rounds = math.ceil(workload.tasks / multiprocessors)
    return rounds * min(forms) / (2 * LANES * CLOCK)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
