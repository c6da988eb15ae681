"""Which modules, functions and methods of torch are which layer, and how their options read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Options = tuple[tuple[str, Any], ...]

ACTIVATION_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.Softplus: ("softplus", ("beta", "threshold")),
}
ACTIVATION_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, kind): kind for kind, _ in ACTIVATION_MODULES.values()},
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu_: "relu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}
ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}

POOL_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.AvgPool2d: (
        "avg_pool2d",
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ("output_size",)),
}
POOL_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, kind): kind for kind, _ in POOL_MODULES.values()},
    torch.max_pool2d: "max_pool2d",
}

OPTIONS: dict[str, tuple[str, ...]] = dict([*ACTIVATION_MODULES.values(), *POOL_MODULES.values()])
"""The options of each function, in the order of its positional arguments."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
    ),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "flatten": ("input", "start_dim", "end_dim"),
    "squeeze": ("input", "dim"),
    "mean": ("input", "dim", "keepdim"),
}  # fmt: skip
FUNCTIONS: dict[Any, str] = {
    F.linear: "linear",
    F.conv2d: "conv2d",
    torch.conv2d: "conv2d",
    F.batch_norm: "batch_norm",
    F.group_norm: "group_norm",
    F.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.flatten: "flatten",
    torch.mean: "mean",
    torch.squeeze: "squeeze",
    torch.reshape: "view",
}
METHODS = {
    "view": "view",
    "reshape": "view",
    "flatten": "flatten",
    "mean": "mean",
    "squeeze": "squeeze",
}
PASSING_METHODS = ("contiguous", "clone")
LEAVING_METHODS = ("item", "tolist", "numpy", "backward", "data_ptr", "register_hook", "storage")
"""Methods whose results torch does not follow."""
PLAIN_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def module_options(module: nn.Module, names: tuple[str, ...]) -> Options:
    """A module's options under the names of its function's arguments."""
    return tuple((name, getattr(module, name)) for name in names)
