"""An MLP in JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.jax_tasks import Network, array
from bench.peers.peer import NotServed
from bench.workloads import Sine, Skip

Layers = list[tuple[Any, Any]]
"""A weight `[in, out]` and a bias `[out]` a layer; of a norm, scale and shift."""


ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.ReLU: jax.nn.relu,
    nn.Tanh: jnp.tanh,
    Sine: lambda x: jnp.sin(30 * x),
}


def relu_chain(model: nn.Module) -> Network:
    """A chain of linear layers with ReLU between them."""
    return Network(_of_chain, forward, gradients)


def _of_chain(model: nn.Module) -> Layers:
    chain = list(model) if isinstance(model, nn.Sequential) else []
    expected = [nn.Linear, nn.ReLU] * (len(chain) // 2) + [nn.Linear]
    if [type(layer) for layer in chain] != expected:
        raise NotServed("the form by hand is written for MLPs with ReLU")
    return _parameters(model)


def forward(parameters: Layers, x: Any) -> Any:
    """The output of such a chain, or of its end."""
    for i, (weight, bias) in enumerate(parameters):
        x = (jax.nn.relu(x) if i else x) @ weight + bias
    return x


def gradients(found: Layers) -> list[Tensor]:
    """As torch has them."""
    tensors: list[Tensor] = []
    for weight, bias in found:
        tensors += [torch.from_numpy(np.array(weight).T), torch.from_numpy(np.array(bias))]
    return tensors


def network(model: nn.Module) -> Network:
    """The same modules one after another: linear layers, norms, activations, sums."""
    return Network(_parameters, partial(_forward, model), gradients)


def _parameters(model: nn.Module) -> Layers:
    known = (nn.Sequential, nn.Linear, nn.LayerNorm, Skip, *ACTIVATIONS)
    if not all(type(module) in known for module in model.modules()):
        raise NotServed("the JAX forms are written for MLPs with one of a few activations")
    return [
        (array(layer.weight.detach().t().contiguous()), array(layer.bias.detach()))
        for layer in model.modules()
        if isinstance(layer, (nn.Linear, nn.LayerNorm))
    ]


def _forward(model: nn.Module, parameters: Layers, x: Any) -> Any:
    return _run(model, iter(parameters), x)


def _run(module: nn.Module, following: Iterator[tuple[Any, Any]], x: Any) -> Any:
    """A module's output, its parameters being the next ones."""
    if isinstance(module, nn.Sequential):
        out = x
        for child in module:
            out = _run(child, following, out)
        return x + out if isinstance(module, Skip) else out
    if isinstance(module, nn.Linear):
        weight, bias = next(following)
        return x @ weight + bias
    if isinstance(module, nn.LayerNorm):
        weight, bias = next(following)
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + module.eps) * weight + bias
    return ACTIVATIONS[type(module)](x)
