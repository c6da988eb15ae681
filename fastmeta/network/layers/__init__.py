"""The kinds of layers, one file each: description, reference, and four rules for all tasks."""

from fastmeta.network.layers.activation import Activation
from fastmeta.network.layers.add import Add
from fastmeta.network.layers.batch_norm import BatchNorm
from fastmeta.network.layers.columns import Scale, Shift
from fastmeta.network.layers.conv2d import Conv2d
from fastmeta.network.layers.dropout import Dropout
from fastmeta.network.layers.elementwise import Elementwise
from fastmeta.network.layers.foreign import Foreign
from fastmeta.network.layers.group_norm import GroupNorm
from fastmeta.network.layers.layer import Batch, Layer, State, Tensors, Wanted
from fastmeta.network.layers.layer_norm import LayerNorm, RMSNorm
from fastmeta.network.layers.linear import Linear
from fastmeta.network.layers.mean import Mean
from fastmeta.network.layers.pool2d import Pool2d
from fastmeta.network.layers.shapes import Flatten, Identity, Reshape

__all__ = [
    "Activation", "Add", "Batch", "BatchNorm", "Conv2d", "Dropout", "Elementwise", "Flatten",
    "Foreign", "GroupNorm", "Identity", "Layer", "LayerNorm", "Linear", "Mean", "Pool2d", "RMSNorm",
    "Reshape", "Scale", "Shift", "State", "Tensors", "Wanted",
]  # fmt: skip
