"""The device of a launch, which is made on torch's current stream there."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor):
    """Makes the tensor's GPU the current one, where it lies on one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
