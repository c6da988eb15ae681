"""JAX under `jit`, over tasks by `vmap` or `lax.scan`; the Hessian-vector product both ways.

*reverse* differentiates the inner loop as it stands; *forward over reverse* walks it backward
explicitly, with each step's Hessian-vector product from `jax.linearize` of its gradient, and the
update rule's pullback from `jax.vjp`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from bench.peers.peer import Form, NotServed, Peer, Step
from bench.workloads import Pair, Workload

Forward = Callable[[Any, Any], Any]


def _reverse_over_vmap(workload: Workload, forward: Forward) -> Callable[..., Any]:
    import jax

    task = _task_loss(workload, forward)
    return jax.value_and_grad(
        lambda theta, *data: jax.vmap(task, (None, 0, 0, 0, 0))(theta, *data).mean()
    )


def _reverse_in_scan(workload: Workload, forward: Forward) -> Callable[..., Any]:
    import jax

    from bench.peers import jax_tasks

    task = jax.value_and_grad(_task_loss(workload, forward))
    run = jax_tasks.scanned(lambda theta, *data: (task(theta, *data), None))
    return lambda theta, *data: run(theta, *data)[0]


def _forward_over_vmap(workload: Workload, forward: Forward) -> Callable[..., Any]:
    from bench.peers import jax_tasks

    run = jax_tasks.vmapped(_sweep(workload, forward))
    return lambda theta, *data: run(theta, *data)[0]


def _forward_in_scan(workload: Workload, forward: Forward) -> Callable[..., Any]:
    from bench.peers import jax_tasks

    run = jax_tasks.scanned(_sweep(workload, forward))
    return lambda theta, *data: run(theta, *data)[0]


def _loss(workload: Workload, forward: Forward) -> Callable[..., Any]:
    from bench.peers import jax_tasks

    loss_of = jax_tasks.loss_function(workload)
    return lambda phi, x, y: loss_of(forward(phi, x), y)


def _task_loss(workload: Workload, forward: Forward) -> Callable[..., Any]:
    import jax

    from bench.peers import jax_tasks

    loss = _loss(workload, forward)
    init, update = jax_tasks.update_rule(workload)

    def task(theta: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        phi, state = theta, init(theta)
        for step in range(workload.steps):
            phi, state = update(phi, jax.grad(loss)(phi, sx, sy), state, step)
        return loss(phi, qx, qy)

    return task


def _sweep(workload: Workload, forward: Forward) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    from bench.peers import jax_tasks

    loss = _loss(workload, forward)
    init, update = jax_tasks.update_rule(workload)

    def task(theta: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        phi, state, pullbacks = theta, init(theta), []
        for step in range(workload.steps):
            gradient, product = jax.linearize(lambda p: jax.grad(loss)(p, sx, sy), phi)
            (phi, state), pull = jax.vjp(partial(update, step=step), phi, gradient, state)
            pullbacks.append((pull, product))
        value, adjoint = jax.value_and_grad(loss)(phi, qx, qy)
        of_state = jax.tree.map(jnp.zeros_like, state)
        for pull, product in reversed(pullbacks):
            direct, gamma, of_state = pull((adjoint, of_state))
            adjoint = jax.tree.map(jnp.add, direct, product(gamma))
        return (value, adjoint), None

    return task


def _form(
    make: Callable[[Workload, Forward], Callable[..., Any]], convolve: str = "by_products"
) -> Form:
    def form(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        from bench.peers import jax_conv, jax_mlp, jax_tasks

        network = jax_mlp.network(model)
        if workload.of_images:
            network = jax_conv.network(model, getattr(jax_conv, convolve))
        elif convolve != "by_products":
            raise NotServed("has no convolution")
        return jax_tasks.step(make(workload, network.forward), network, model, support, query)

    return form


ON_GPU = {
    "vmap, reverse": _form(_reverse_over_vmap),
    "vmap, forward over reverse": _form(_forward_over_vmap),
    "vmap, reverse, XLA's convolution": _form(_reverse_over_vmap, "by_xla"),
}
"""Forms that take all tasks at once."""

PEER = Peer(
    "JAX jit",
    {
        "vmap, reverse": _form(_reverse_over_vmap),
        "vmap, forward over reverse": _form(_forward_over_vmap),
        "scan, reverse": _form(_reverse_in_scan),
        "scan, forward over reverse": _form(_forward_in_scan),
        "scan, reverse, XLA's convolution": _form(_reverse_in_scan, "by_xla"),
    },
    module="jax",
    install='pip install -c constraints.txt -e ".[bench]"',
)
