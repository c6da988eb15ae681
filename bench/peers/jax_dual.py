"""A yardstick: JAX given the dual form of the first layer by hand. Nobody ships this.

The first layer's input is data, so its weight after k steps is `W - X_s^T S_k`, where S collects
the steps' deltas: neither per-task copies of W nor products with the data are needed inside the
loop, only the Gram matrices `X_s X_s^T` and `X_q X_s^T`. The bias learns at the same rate, so
adding 1 to every entry of the Gram matrices carries it along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bench.peers.peer import Form, Peer, Step, descent_only
from bench.workloads import Pair, Workload


def _meta_step(
    workload: Workload,
    over_tasks: Callable[[Callable[..., Any]], Callable[..., Any]],
    make_task: Callable[[Workload], Callable[..., Any]],
) -> Callable[..., Any]:
    import jax.numpy as jnp

    run = over_tasks(make_task(workload))

    def step(theta: Any, sx: Any, sy: Any, qx: Any, qy: Any) -> Any:
        (weight, bias), *rest = theta
        p_s, p_q = sx @ weight + bias, qx @ weight + bias  # [T, N, H], [T, Q, H]
        g_ss = sx @ sx.mT + 1  # [T, N, N]
        g_qs = qx @ sx.mT + 1  # [T, Q, N]
        (loss, d_rest), (d_s, d_q) = run(rest, p_s, g_ss, sy, p_q, g_qs, qy)
        d_weight = jnp.einsum("tnd,tnh->dh", sx, d_s) + jnp.einsum("tqd,tqh->dh", qx, d_q)
        d_bias = d_s.sum((0, 1)) + d_q.sum((0, 1))
        first = (d_weight / workload.tasks, d_bias / workload.tasks)
        return loss, [first, *d_rest]

    return step


def _tail_loss(workload: Workload) -> Callable[..., Any]:
    """Loss as a function of the first layer's output and the parameters of the rest."""
    import jax

    from bench.peers import jax_mlp, jax_tasks

    loss_of = jax_tasks.loss_function(workload)
    return lambda z, rest, y: loss_of(jax_mlp.forward(rest, jax.nn.relu(z)), y)


def _reverse(workload: Workload) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    loss, rate = _tail_loss(workload), workload.inner_lr

    def task_loss(rest: Any, p_s: Any, p_q: Any, g_ss: Any, sy: Any, g_qs: Any, qy: Any) -> Any:
        s = jnp.zeros_like(p_s)
        for _ in range(workload.steps):
            delta, gradient = jax.grad(loss, (0, 1))(p_s - g_ss @ s, rest, sy)
            s = s + rate * delta
            rest = jax.tree.map(lambda p, g: p - rate * g, rest, gradient)
        return loss(p_q - g_qs @ s, rest, qy)

    def task(rest: Any, p_s: Any, g_ss: Any, sy: Any, p_q: Any, g_qs: Any, qy: Any) -> Any:
        value, (d_rest, d_s, d_q) = jax.value_and_grad(task_loss, (0, 1, 2))(
            rest, p_s, p_q, g_ss, sy, g_qs, qy
        )
        return (value, d_rest), (d_s, d_q)

    return task


def _forward_over_reverse(workload: Workload) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    loss, rate = _tail_loss(workload), workload.inner_lr

    def task(rest: Any, p_s: Any, g_ss: Any, sy: Any, p_q: Any, g_qs: Any, qy: Any) -> Any:
        s, products = jnp.zeros_like(p_s), []
        for _ in range(workload.steps):
            (delta, gradient), product = jax.linearize(
                lambda z, r: jax.grad(loss, (0, 1))(z, r, sy), p_s - g_ss @ s, rest
            )
            products.append(product)
            s = s + rate * delta
            rest = jax.tree.map(lambda p, g: p - rate * g, rest, gradient)
        value, (d_q, d_rest) = jax.value_and_grad(loss, (0, 1))(p_q - g_qs @ s, rest, qy)
        d_s, adjoint = jnp.zeros_like(p_s), -g_qs.mT @ d_q  # of p_s and of s
        for product in reversed(products):
            # s grew by the delta and rest fell by its gradient: hence the signs.
            d_z, d_r = product(rate * adjoint, jax.tree.map(lambda d: -rate * d, d_rest))
            d_s, adjoint = d_s + d_z, adjoint - g_ss @ d_z
            d_rest = jax.tree.map(jnp.add, d_rest, d_r)
        return (value, d_rest), (d_s, d_q)

    return task


def _form(over_tasks: str, make_task: Callable[[Workload], Callable[..., Any]]) -> Form:
    def form(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
        from bench.peers import jax_mlp, jax_tasks

        descent_only(workload, "the form by hand")
        function = _meta_step(workload, getattr(jax_tasks, over_tasks), make_task)
        return jax_tasks.step(function, jax_mlp.relu_chain(model), model, support, query)

    return form


PEER = Peer(
    "JAX dual by hand",
    {
        "vmap, reverse": _form("vmapped", _reverse),
        "vmap, forward over reverse": _form("vmapped", _forward_over_reverse),
        "scan, reverse": _form("scanned", _reverse),
        "scan, forward over reverse": _form("scanned", _forward_over_reverse),
    },
    module="jax",
    install='pip install -c constraints.txt -e ".[bench]"',
    role="yardstick",
)
