"""A warning, once a model, where one that the kernels are made for is left to the general path."""

from __future__ import annotations

import weakref

from torch import nn

from fastmeta.network.layers import Foreign
from fastmeta.network.provenance import is_torchs
from fastmeta.plan.selection import Selected
from fastmeta.warning import warn

_SERVED = (
    nn.Linear, nn.Conv2d, nn.PReLU, nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_wanted = True


def set_cliff_warnings(wanted: bool) -> None:
    """Turn the warnings of slow execution on or off, for the whole process.

    The first time that a multilayer perceptron or a convolutional network is left to the general
    path, which is about as fast as a plain autograd loop, or has a layer that torch must compute,
    a `UserWarning` says why and what would avoid it. Models of other kinds are left there without
    a warning.
    """
    global _wanted
    _wanted = wanted


def warn_of_cliff(model: nn.Module, selected: Selected) -> None:
    """Warn where torch computes a step that the kernels could, but for one cause."""
    why = cause(selected)
    if not why or not _wanted or model in _warned or not _is_served(model):
        return
    _warned.add(model)
    how = "runs on the general path, about as fast as a plain autograd loop and"
    if selected.executor.replaces_module:
        how = "runs layer by layer,"
    warn(
        f"model: {type(model).__name__} {how} several times slower than compiled: {why}. "
        "fastmeta.explain(model, support, query, ...) says more; "
        "fastmeta.set_cliff_warnings(False) turns this warning off."
    )


def cause(selected: Selected) -> str | None:
    """The reason why no compiled executor computes a step; None where one does, or is slower."""
    convolutions = selected.reading.profile.has_convolution
    if not selected.executor.replaces_module:
        return selected.unsupported_by("layered" if convolutions else "fused")
    network = selected.reading.network
    if network is None or not any(isinstance(node.layer, Foreign) for node in network.nodes):
        return None
    if convolutions:
        return selected.unsupported.get("layered-cpu")
    return selected.unsupported_by("fused")


def _is_served(model: nn.Module) -> bool:
    """Return whether a model is made of what the kernels know, and maybe of own code."""
    owners = [module for module in model.modules() if module._parameters]
    known = all(isinstance(m, _SERVED) or not is_torchs(type(m)) for m in owners)
    return known and any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in owners)
