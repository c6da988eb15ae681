"""An MLP in JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.jax_tasks import Network, array
from bench.peers.peer import NotServed
from bench.workloads import Sine

Layers = list[tuple[Any, Any]]
"""A weight `[in, out]` and a bias `[out]` a layer."""


ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.ReLU: jax.nn.relu,
    nn.Tanh: jnp.tanh,
    Sine: lambda x: jnp.sin(30 * x),
}


def layers(model: nn.Module, activation: type[nn.Module] = nn.ReLU) -> Layers:
    """The parameters of a chain of linear layers with that activation between them."""
    chain = list(model) if isinstance(model, nn.Sequential) else []
    expected = [nn.Linear, activation] * (len(chain) // 2) + [nn.Linear]
    if [type(layer) for layer in chain] != expected:
        raise NotServed("the JAX forms are written for MLPs with one of a few activations")
    return [
        (array(layer.weight.detach().T), array(layer.bias.detach()))
        for layer in chain
        if isinstance(layer, nn.Linear)
    ]


def forward(parameters: Layers, x: Any, activation: Callable[[Any], Any] = jax.nn.relu) -> Any:
    for i, (weight, bias) in enumerate(parameters):
        x = (activation(x) if i else x) @ weight + bias
    return x


def gradients(found: Layers) -> list[Tensor]:
    """As torch has them."""
    tensors: list[Tensor] = []
    for weight, bias in found:
        tensors += [torch.from_numpy(np.array(weight).T), torch.from_numpy(np.array(bias))]
    return tensors


def network(model: nn.Module) -> Network:
    """The network with the activation of a module."""
    kinds = (kind for kind in ACTIVATIONS if any(type(m) is kind for m in model.modules()))
    kind = next(kinds, nn.ReLU)
    return Network(
        partial(layers, activation=kind), partial(forward, activation=ACTIVATIONS[kind]), gradients
    )
