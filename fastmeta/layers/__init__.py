"""The kinds of layers, one file each: description, reference, and four rules for all tasks."""

from fastmeta.layers.activation import Activation
from fastmeta.layers.add import Add
from fastmeta.layers.batch_norm import BatchNorm
from fastmeta.layers.conv2d import Conv2d
from fastmeta.layers.group_norm import GroupNorm
from fastmeta.layers.layer import Batch, Layer, State, Tensors, Wanted
from fastmeta.layers.layer_norm import LayerNorm
from fastmeta.layers.linear import Linear
from fastmeta.layers.mean import Mean
from fastmeta.layers.pool2d import Pool2d
from fastmeta.layers.shapes import Flatten, Identity, Reshape

__all__ = [
    "Activation", "Add", "Batch", "BatchNorm", "Conv2d", "Flatten", "GroupNorm", "Identity",
    "Layer", "LayerNorm", "Linear", "Mean", "Pool2d", "Reshape", "State", "Tensors", "Wanted",
]  # fmt: skip
