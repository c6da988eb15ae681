"""A network's convolutions, and what follows them, in layers that Triton's kernels compute."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fastmeta.executors.layers.lowering import Lowered
from fastmeta.network.graph import Node
from fastmeta.network.layers import Activation, BatchNorm, Conv2d, Layer, Pool2d
from fastmeta.network.layers.triton_block import TritonBlock
from fastmeta.network.layers.triton_conv2d import TritonConv2d

LARGEST_WINDOW = 63
"""Pixels: the kernels keep a place in a window and a sign in a byte."""


def on_triton(lowered: Lowered) -> Lowered:
    """The same network: runs of layers that one block can take in its place, other convolutions."""
    nodes, readers = lowered.nodes, [0] * len(lowered.nodes)
    for node in nodes:
        for source in node.inputs:
            if source >= 0:
                readers[source] += 1
    readers[lowered.output] += 1
    following = {node.inputs[0]: i for i, node in enumerate(nodes) if len(node.inputs) == 1}
    place, taken, kept = {-1: -1}, set[int](), list[Node]()
    for i, node in enumerate(nodes):
        if i in taken:
            continue
        run = [i]
        if isinstance(node.layer, Conv2d):
            while readers[run[-1]] == 1 and _goes_on(nodes, run, following.get(run[-1], -1)):
                run.append(following[run[-1]])
            node = _joined([nodes[k] for k in run])
        taken.update(run)
        place[run[-1]] = len(kept)
        kept.append(replace(node, inputs=tuple(place[source] for source in node.inputs)))
    return replace(lowered, nodes=tuple(kept), output=place[lowered.output])


def _goes_on(nodes: tuple[Node, ...], run: list[int], i: int) -> bool:
    """Whether a block takes layer `i` behind those of `run`."""
    if i < 0:
        return False
    layer, kinds = nodes[i].layer, [type(nodes[k].layer) for k in run]
    if isinstance(layer, BatchNorm):
        return len(run) == 1 and layer.batch_statistics
    if BatchNorm not in kinds or Pool2d in kinds:
        return False
    if isinstance(layer, Activation):
        return layer.kind in ("relu", "leaky_relu") and Activation not in kinds
    return isinstance(layer, Pool2d) and _window(layer) is not None


def _joined(run: list[Node]) -> Node:
    layers = [node.layer for node in run]
    first = layers[0]
    assert isinstance(first, Conv2d)
    conv = TritonConv2d(**{field.name: getattr(first, field.name) for field in fields(first)})
    layer: Layer = conv
    if len(run) > 1:
        norm, slope, window = layers[1], 1.0, (1, 1)
        assert isinstance(norm, BatchNorm)
        for each in layers[2:]:
            if isinstance(each, Activation):
                given = dict(each.options).get("negative_slope", 0.01)
                slope = float(given) if each.kind == "leaky_relu" else 0.0
            elif isinstance(each, Pool2d):
                window = _window(each) or window
        layer = TritonBlock(conv, norm, tuple(layers), slope, window)
    # Of what lies between the convolution's output and the last one, nothing is kept.
    kept = run[0].bytes + (run[-1].bytes if len(run) > 1 else 0)
    return Node(
        layer, run[0].inputs, run[-1].name, run[-1].shape, sum(node.flops for node in run), kept
    )


def _window(pool: Pool2d) -> tuple[int, int] | None:
    """The window of maxima that don't overlap and leave no border; None where it is another."""
    options: dict[str, Any] = dict(pool.options)
    if pool.kind != "max_pool2d" or options.get("ceil_mode"):
        return None
    height, width = _pair(options["kernel_size"])
    stride = options.get("stride")
    plain = (
        _pair(stride or (height, width)) == (height, width)
        and _pair(options.get("padding", 0)) == (0, 0)
        and _pair(options.get("dilation", 1)) == (1, 1)
    )
    return (height, width) if plain and height * width <= LARGEST_WINDOW else None


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    both = tuple(value)
    return both[0], both[-1]
