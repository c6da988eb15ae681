"""Shared by all JAX forms: a network, its loss, and ways to run all tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from bench import rules, workloads
from bench.peers.peer import NotServed, Result, Step
from bench.workloads import Pair, Workload


@dataclass(frozen=True)
class Network:
    """The JAX counterpart of a torch module."""

    parameters: Callable[[nn.Module], Any]
    """A module's, as a tree of arrays. **Raises** `NotServed`."""
    forward: Callable[[Any, Any], Any]
    """Outputs from parameters and one task's inputs `[N, ...]`."""
    gradients: Callable[[Any], list[Tensor]]
    """A tree like the parameters, in the order of `model.parameters()`."""


def array(tensor: Tensor) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(tensor.numpy()))


def _policy_loss(mean: Any, target: Any) -> Any:
    action, advantage = target[..., :-1], target[..., -1]
    log_std = array(workloads.LOG_STD.detach()).astype(mean.dtype)
    z = (action - mean) * jnp.exp(-log_std)
    return jnp.mean(jnp.sum(0.5 * z**2 + log_std, -1) * advantage)


def _reinforce(mean: Any, target: Any) -> Any:
    action, advantage = target[..., :-1], target[..., -1]
    return jnp.mean(jnp.sum(0.5 * ((action - mean) / 0.3) ** 2, -1) * advantage)


_OWN = {workloads.policy_loss: _policy_loss, workloads.reinforce: _reinforce}
"""The workloads' own losses."""


def loss_function(workload: Workload) -> Callable[[Any, Any], Any]:
    """Loss of outputs and targets: mean squares, or cross-entropy by one-hot targets."""
    if workload.own_loss is not None:
        try:
            return _OWN[workload.own_loss]
        except KeyError:
            raise NotServed("the JAX forms don't have its loss") from None
    classes = workload.classes
    if classes is None:
        return lambda outputs, y: jnp.mean((outputs - y) ** 2)
    # A product with one-hot targets: taking entries by index has a scatter for a derivative,
    # which is slow on the CPU.
    return lambda outputs, y: (
        -jnp.mean(jnp.sum(jax.nn.one_hot(y, classes) * jax.nn.log_softmax(outputs), -1))
    )


Update = Callable[[Any, Any, Any, int], tuple[Any, Any]]
"""Parameters and state after a step, from them, the gradients, the state and the step's number."""


def update_rule(workload: Workload) -> tuple[Callable[[Any], Any], Update]:
    """The state before the first step, of the parameters; and the inner loop's rule."""
    rate, (b1, b2) = workload.inner_lr, rules.BETAS
    each = jax.tree.map

    def zeros(phi: Any) -> Any:
        return each(jnp.zeros_like, phi)

    def descent(phi: Any, gradients: Any, state: Any, step: int) -> tuple[Any, Any]:
        return each(lambda p, g: p - rate * g, phi, gradients), state

    def momentum(phi: Any, gradients: Any, m: Any, step: int) -> tuple[Any, Any]:
        m = each(lambda a, g: rules.MOMENTUM * a + g, m, gradients)
        return each(lambda p, a: p - rate * a, phi, m), m

    def adam(phi: Any, gradients: Any, state: Any, step: int) -> tuple[Any, Any]:
        root = (1 - b2 ** (step + 1)) ** 0.5  # taken out of the entries' roots: see bench/rules.py
        size, eps = rate * root / (1 - b1 ** (step + 1)), rules.EPS * root

        def moved(p: Any, a: Any, v: Any) -> Any:
            return p - size * (a / (jnp.sqrt(v + jnp.finfo(v.dtype).tiny) + eps))

        m = each(lambda a, g: b1 * a + (1 - b1) * g, state[0], gradients)
        v = each(lambda a, g: b2 * a + (1 - b2) * g * g, state[1], gradients)
        return each(moved, phi, m, v), (m, v)

    return {
        "descent": (lambda phi: (), descent),
        "momentum": (zeros, momentum),
        "Adam": (lambda phi: (zeros(phi), zeros(phi)), adam),
    }[workload.rule]


def vmapped(task: Callable[..., Any]) -> Callable[..., Any]:
    """`task(shared, *data)` gives (sums, own): means of the sums over tasks, own by task."""

    def run(shared: Any, *data: Any) -> Any:
        sums, own = jax.vmap(lambda *one: task(shared, *one))(*data)
        return jax.tree.map(lambda value: value.mean(0), sums), own

    return run


def scanned(task: Callable[..., Any]) -> Callable[..., Any]:
    """The same, one task after another: what it works on stays in the cache."""

    def run(shared: Any, *data: Any) -> Any:
        tasks = len(data[0])

        def body(total: Any, one: Any) -> Any:
            sums, own = task(shared, *one)
            return jax.tree.map(lambda t, value: t + value / tasks, total, sums), own

        first = jax.tree.map(lambda value: value[0], data)
        shapes, _ = jax.eval_shape(task, shared, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, data)

    return run


def step(
    function: Callable[..., Any], network: Network, model: nn.Module, support: Pair, query: Pair
) -> Step:
    """Of `function(parameters, *data)`, which gives the loss and its gradient."""
    double = support[0].dtype == torch.float64
    with jax.enable_x64(double):
        theta = network.parameters(model)
        data = [array(t) for t in (*support, *query)]
    compiled = jax.jit(function)

    def call() -> Any:
        return jax.block_until_ready(compiled(theta, *data))

    def in_double() -> Any:  # to be checked, never timed
        with jax.enable_x64(True):
            return call()

    def read(result: Any) -> Result:
        loss, gradients = result
        return float(loss), network.gradients(gradients)

    return Step(in_double if double else call, read)
