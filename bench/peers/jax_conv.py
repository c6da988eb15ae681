"""A convolutional workload in JAX: its parameters, and the network by each set's statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from bench.peers import jax_mlp
from bench.peers.peer import NotServed, Result
from bench.workloads import StridedConv4, Workload

EPS = 1e-5
"""Of torch's batch norm."""

POOLED = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d] * 4 + [nn.Flatten, nn.Linear]


def parameters(model: nn.Module) -> list[jax.Array]:
    """In torch's shapes and order: four of each block, then the head's two."""
    if not isinstance(model, StridedConv4) and [type(m) for m in model.children()] != POOLED:
        raise NotServed("the JAX forms are written for the workloads' own networks")
    return [jax_mlp.array(p.detach()) for p in model.parameters()]


def network(workload: Workload) -> Callable[[list[Any], Any], Any]:
    """The outputs for one set of images `[N, C, H, W]`."""
    strided = isinstance(workload.network(), StridedConv4)
    strides = (2, 2) if strided else (1, 1)

    def apply(theta: list[Any], x: Any) -> Any:
        *blocks, weight, bias = theta
        for i in range(0, len(blocks), 4):
            filters, shift, *of_norm = blocks[i : i + 4]
            x = jax.lax.conv_general_dilated(
                x, filters, strides, [(1, 1), (1, 1)], dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = jax.nn.relu(_normalised(x + shift[:, None, None], *of_norm))
            x = x if strided else _pooled(x)
        features = x.mean((2, 3)) if strided else x.reshape(len(x), -1)
        return features @ weight.T + bias

    return apply


def read(result: Any) -> Result:
    loss, gradients = result
    return float(loss), [torch.from_numpy(np.array(gradient)) for gradient in gradients]


def _normalised(x: Any, scale: Any, shift: Any) -> Any:
    mean = x.mean((0, 2, 3), keepdims=True)
    away = x - mean
    h = away * jax.lax.rsqrt((away * away).mean((0, 2, 3), keepdims=True) + EPS)
    return h * scale[:, None, None] + shift[:, None, None]


def _pooled(x: Any) -> Any:
    """The maxima of 2x2 windows; a rest at the border is left out."""
    count, channels, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, channels, height // 2, 2, width // 2, 2).max((3, 5))
