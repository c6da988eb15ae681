"""JAX under `jit`, over tasks by `vmap` or `lax.scan`; the Hessian-vector product both ways.

*reverse* differentiates the inner loop as it stands; *forward over reverse* walks it backward
explicitly, with each step's Hessian-vector product from `jax.linearize` of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bench.peers.peer import Form, Peer, Step
from bench.workloads import Pair, Workload


def _reverse_over_vmap(workload: Workload) -> Callable[..., Any]:
    import jax

    task = _task_loss(workload)
    return jax.value_and_grad(
        lambda theta, *data: jax.vmap(task, (None, 0, 0, 0, 0))(theta, *data).mean()
    )


def _reverse_in_scan(workload: Workload) -> Callable[..., Any]:
    import jax

    from bench.peers import jax_mlp

    task = jax.value_and_grad(_task_loss(workload))
    run = jax_mlp.scanned(lambda theta, *data: (task(theta, *data), None))
    return lambda theta, *data: run(theta, *data)[0]


def _forward_over_vmap(workload: Workload) -> Callable[..., Any]:
    from bench.peers import jax_mlp

    run = jax_mlp.vmapped(_sweep(workload))
    return lambda theta, *data: run(theta, *data)[0]


def _forward_in_scan(workload: Workload) -> Callable[..., Any]:
    from bench.peers import jax_mlp

    run = jax_mlp.scanned(_sweep(workload))
    return lambda theta, *data: run(theta, *data)[0]


def _task_loss(workload: Workload) -> Callable[..., Any]:
    import jax

    from bench.peers import jax_mlp

    loss_of, network = jax_mlp.loss_function(workload), _network(workload)

    def loss(phi: Any, x: Any, y: Any) -> Any:
        return loss_of(network(phi, x), y)

    def task(theta: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        phi = theta
        for _ in range(workload.steps):
            gradients = jax.grad(loss)(phi, sx, sy)
            phi = jax.tree.map(lambda p, g: p - workload.inner_lr * g, phi, gradients)
        return loss(phi, qx, qy)

    return task


def _sweep(workload: Workload) -> Callable[..., Any]:
    import jax

    from bench.peers import jax_mlp

    loss_of, network = jax_mlp.loss_function(workload), _network(workload)

    def loss(phi: Any, x: Any, y: Any) -> Any:
        return loss_of(network(phi, x), y)

    def descend(p: Any, g: Any) -> Any:
        return jax.tree.map(lambda a, b: a - workload.inner_lr * b, p, g)

    def task(theta: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        phi, products = theta, []
        for _ in range(workload.steps):
            gradient, product = jax.linearize(lambda p: jax.grad(loss)(p, sx, sy), phi)
            products.append(product)
            phi = descend(phi, gradient)
        value, adjoint = jax.value_and_grad(loss)(phi, qx, qy)
        for product in reversed(products):
            adjoint = descend(adjoint, product(adjoint))
        return (value, adjoint), None

    return task


def _network(workload: Workload) -> Callable[..., Any]:
    from bench.peers import jax_conv, jax_mlp

    return jax_conv.network(workload) if workload.of_images else jax_mlp.network


def _form(make: Callable[[Workload], Callable[..., Any]]) -> Form:
    def form(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        from bench.peers import jax_conv, jax_mlp

        of = (jax_conv.parameters, jax_conv.read) if workload.of_images else ()
        return jax_mlp.step(make(workload), model, support, query, *of)

    return form


PEER = Peer(
    "JAX jit",
    {
        "vmap, reverse": _form(_reverse_over_vmap),
        "vmap, forward over reverse": _form(_forward_over_vmap),
        "scan, reverse": _form(_reverse_in_scan),
        "scan, forward over reverse": _form(_forward_in_scan),
    },
    module="jax",
    install='pip install -c constraints.txt -e ".[bench]"',
)
