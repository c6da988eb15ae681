"""Reads a module's own `forward` into layers, by `torch.fx`; says why where it can't."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.network.foreign import facts
from fastmeta.network.graph import Network
from fastmeta.network.graph_reader import GraphReader, Unreadable
from fastmeta.network.hooks import GLOBAL_HOOKS, has_hooks
from fastmeta.network.layers import Foreign
from fastmeta.network.provenance import is_torchs
from fastmeta.network.random_state import same_random_numbers
from fastmeta.network.stateless import StatelessModel
from fastmeta.network.tracing import trace


def read(model: nn.Module, example: Any) -> Network:
    """The layers of `model`, checked against the module itself on `example` (`[N, ...]`).

    **Raises** `Unreadable` with the reason.
    """
    if not isinstance(example, Tensor):
        raise Unreadable("its input is a tree, not one tensor")
    _refuse_altered_modules(model)
    try:
        # Tracing runs the module's Python; a copy keeps what that may write out of the model.
        twin = copy.deepcopy(model)
        graph = trace(twin)
    except Exception as error:  # forward is arbitrary code: any exception means it can't be read
        raise Unreadable(
            f"torch.fx can't trace its forward, which may not branch on data ({_first_line(error)})"
        ) from None
    count = len(example) if example.dim() else 0
    floating = example.is_floating_point()
    found = GraphReader(model, lambda: facts(twin, graph, example), count, floating).network(graph)
    return verify(found, model, example)


def verify(network: Network, model: nn.Module, example: Tensor) -> Network:
    """fx can lie (baked-in sizes, branches taken once): the layers must repeat the module.

    Returns the network with shapes and FLOPs filled in; **raises** `Unreadable` with the reason.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    with torch.no_grad():
        try:
            network = network.measured(tensors, example)
        except Exception as error:
            raise Unreadable(f"its layers don't run by themselves ({_first_line(error)})") from None
        _compare(network, model, tensors, example)
        if any(isinstance(node.layer, Foreign) for node in network.nodes):
            # Sizes of the example may be baked into what has no rules: with another, that shows.
            more = torch.cat([example, example[:1]])
            try:
                longer = network.measured(tensors, more)
                same = [node.shape for node in longer.nodes] == [n.shape for n in network.nodes]
            except Exception:
                same = False
            if not same:
                raise Unreadable("the number of examples is baked into its forward")
            _compare(network, model, tensors, more)
    return network


def _compare(network: Network, model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> None:
    """**Raises** where the layers don't repeat the module, or that writes its input."""
    try:
        with same_random_numbers(x.device):
            ours = network.forward(tensors, x)
    except Exception as error:
        raise Unreadable(f"its layers don't run by themselves ({_first_line(error)})") from None
    # torch.func.functional_call leaves its buffers behind in a module that hangs at two places.
    stateless = StatelessModel(model, tuple(name for name, _ in model.named_buffers()))
    with same_random_numbers(x.device):
        theirs = stateless({}, x, stateless.scratch())
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        raise Unreadable("its layers give an output of another shape than the module")
    # Rounding grows with depth; anything past that is another function.
    tolerance = 16 * len(network.nodes) * torch.finfo(theirs.dtype).eps
    scale = float(theirs.abs().amax().nan_to_num(0.0).clamp_min(1.0))
    if not torch.allclose(ours, theirs, rtol=0, atol=tolerance * scale, equal_nan=True):
        raise Unreadable("its layers give another output than the module")


def _refuse_altered_modules(model: nn.Module) -> None:
    if any(GLOBAL_HOOKS):
        raise Unreadable("hooks on every module are set")
    for name, module in model.named_modules():
        label = name or type(module).__name__
        if has_hooks(module):
            raise Unreadable(f"layer {label!r} has hooks; remove them")
        if hasattr(module, "parametrizations"):
            raise Unreadable(f"layer {label!r} is parametrized")
        if is_torchs(type(module)) and not is_torchs(type(module).forward):
            raise Unreadable(f"the forward of {type(module).__name__} was replaced")
        if "forward" in vars(module):
            raise Unreadable(f"{label} has a forward of its own on the instance")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
