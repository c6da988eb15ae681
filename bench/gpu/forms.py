"""What is timed on a GPU: fastmeta in several ways, and those of its peers that run there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastmeta
from bench.peers import compiled, functional, jax_jit, plain, supervised
from bench.peers.peer import NotServed, Peer, Step, into_grad
from bench.workloads import Pair, Workload

MOST_LOOPED = 100
"""Tasks from which the plain loop, whose time grows with them, is not waited for."""


def _options(workload: Workload) -> dict[str, object]:
    return {
        "inner_lr": workload.inner_lr, "inner_steps": workload.steps, "loss_fn": workload.loss_fn,
        "executor": "layered" if workload.of_images else "fused",
    }  # fmt: skip


def _called(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    """`maml_step` and `backward`, whole."""
    options = _options(workload)

    def step() -> Tensor:
        out = fastmeta.maml_step(model, support, query, **options)
        out.loss.backward()
        return out.loss.detach()

    try:
        step()
    except ValueError as reason:
        raise NotServed(str(reason)) from reason
    return into_grad(model, step)


def _captured(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    """The same of `MAML(capture=True)`."""
    if support[0].device.type != "cuda":
        raise NotServed("CUDA graphs are a GPU's")
    maml = fastmeta.MAML(model, capture=True, **_options(workload))

    def step() -> Tensor:
        out = maml(support, query)
        out.loss.backward()
        return out.loss.detach()

    try:
        step()
    except ValueError as reason:
        raise NotServed(str(reason)) from reason
    return into_grad(model, step)


def _in_graph(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
    """`maml_step` and `backward` inside a graph of the caller's own: the device alone."""
    if support[0].device.type != "cuda":
        raise NotServed("CUDA graphs are a GPU's")
    step = _called(workload, model, support, query)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step.call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.call()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return Step(replay, step.read)


def _few_tasks(peer: Peer) -> Peer:
    def limited(form):
        def make(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Step:
            if workload.tasks > MOST_LOOPED:
                raise NotServed(f"not waited for above {MOST_LOOPED} tasks")
            return form(workload, model, support, query)

        return make

    return Peer(peer.name, {name: limited(form) for name, form in peer.forms.items()})


FASTMETA = Peer(
    "fastmeta",
    {
        "in a graph": _in_graph, "in a graph, TF32": _in_graph, "capture=True": _captured,
        "maml_step": _called,
    },
    role="fastmeta",
)  # fmt: skip
ROUNDED = {"in a graph, TF32": ("W1b, T=25", "W1c, T=1000", "W2b, T=32", "W3, T=32", "tiny")}
"""Forms with TF32 products, and of which workloads; those of images are so for every side."""
PEERS = (
    FASTMETA,
    _few_tasks(Peer("plain loop", {"backward at end": plain.PEER.forms["backward at end"]})),
    functional.PEER,
    Peer("torch.compile", {"grad over vmap": compiled.PEER.forms["grad over vmap"]}),
    Peer("JAX jit", jax_jit.ON_GPU, module="jax"),
    supervised.PEER,
)
SLOW = ("torch.compile", "JAX jit")
OWN_DEVICE = ("JAX jit",)
"""Peers that put the data on the device themselves, and wait for their results."""
