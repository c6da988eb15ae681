"""Hooks of modules: what they observe or change is not to be computed in a module's stead."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
