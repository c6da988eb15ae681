"""The convolutional workloads in JAX, images channels last: a convolution as a matrix product.

JAX's own convolution is the second form where weights are the tasks' own: under `scan` each task's
runs by itself, while under `vmap` they become groups, which XLA computes slowly on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.jax_tasks import Network, array
from bench.peers.peer import NotServed

Convolve = Callable[[Any, Any, int], Any]
"""Of images `[N, H, W, C]` and a weight `[3, 3, C, out]`, padded by one, by a stride."""


def by_products(x: Any, weight: Any, stride: int) -> Any:
    """The nine shifted images side by side, and one product."""
    rows, columns = ((side - 1) // stride + 1 for side in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride][
            :, :rows, :columns
        ]
        for i, j in itertools.product(range(3), range(3))
    ]
    return jnp.concatenate(shifted, -1) @ weight.reshape(-1, weight.shape[-1])


def by_xla(x: Any, weight: Any, stride: int) -> Any:
    """XLA's own convolution."""
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(model: nn.Module, convolve: Convolve) -> Network:
    """Of blocks [3x3 convolution, batch norm, ReLU, maybe pooling by 2] and a linear layer."""
    kinds = [type(layer) for layer in _layers(model)]
    strides = [layer.stride[0] for layer in _layers(model) if isinstance(layer, nn.Conv2d)]
    expected = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    pooled = nn.MaxPool2d in kinds
    block = [*expected, nn.MaxPool2d] if pooled else expected
    if kinds != [*block * len(strides), nn.Linear] or not strides:
        raise NotServed("the JAX forms are written for the convolutional workloads")
    eps = next(layer.eps for layer in _layers(model) if isinstance(layer, nn.BatchNorm2d))

    def forward(parameters: Any, x: Any) -> Any:
        *blocks, (head, bias) = parameters
        x = x.transpose(0, 2, 3, 1)
        for stride, (weight, shift, scale, center) in zip(strides, blocks, strict=True):
            x = convolve(x, weight, stride) + shift
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = jax.nn.relu((x - mean) * (jax.lax.rsqrt(variance + eps) * scale) + center)
            if pooled:
                x = _pooled(x)
        x = x.reshape(len(x), -1) if pooled else x.mean((1, 2))
        return x @ head + bias

    return Network(_parameters, forward, _gradients)


def _pooled(x: Any) -> Any:
    """Maxima of 2 x 2 windows, pair by pair: of one reduction XLA makes wrong gradients."""
    rows, columns = (side // 2 * 2 for side in x.shape[1:3])
    above, below = (
        jnp.maximum(x[:, i:rows:2, 0:columns:2], x[:, i:rows:2, 1:columns:2]) for i in range(2)
    )
    return jnp.maximum(above, below)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Those that compute, in order."""
    plain = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Linear)
    return [layer for layer in model.modules() if isinstance(layer, plain)]


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    layers = _layers(model)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    return zip(convolutions, norms, strict=True)


def _parameters(model: nn.Module) -> list[tuple[Any, ...]]:
    """Of each block weight `[3, 3, in, out]`, bias, scale and shift; of the head `[in, out]`."""
    blocks: list[tuple[Any, ...]] = []
    for conv, norm in _blocks(model):
        weight = conv.weight.detach().permute(2, 3, 1, 0)
        given = (weight, conv.bias, norm.weight, norm.bias)
        blocks.append(tuple(array(each.detach()) for each in given))
    head = _layers(model)[-1]
    assert isinstance(head, nn.Linear)
    weight = _pixels_last(head.weight.detach(), blocks[-1][1].shape[0])
    return [*blocks, (array(weight.T), array(head.bias.detach()))]


def _pixels_last(weight: Tensor, channels: int) -> Tensor:
    """`[out, C * pixels]` as `[out, pixels * C]`, which channels-last images are flattened to."""
    return weight.unflatten(1, (channels, -1)).mT.flatten(1)


def _gradients(found: Any) -> list[Tensor]:
    """As torch has them."""
    *blocks, (head, bias) = [tuple(torch.from_numpy(np.array(g)) for g in each) for each in found]
    tensors: list[Tensor] = []
    for weight, *rest in blocks:
        tensors += [weight.permute(3, 2, 0, 1), *rest]
    channels = len(blocks[-1][1])
    return [*tensors, head.T.unflatten(1, (-1, channels)).mT.flatten(1), bias]
