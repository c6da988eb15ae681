"""Reads a module's own `forward` into layers, by `torch.fx`; says why where it can't."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastmeta.plan import layers
from fastmeta.plan.layers import Layer, Network, Node


class Unreadable(Exception):
    """The module's forward holds something that is no known layer; the message says what."""


def read(model: nn.Module, example: Any) -> Network:
    """The layers of `model`, checked against the module itself on `example` (`[N, ...]`).

    **Raises** `Unreadable` with the reason.
    """
    if not isinstance(example, Tensor):
        raise Unreadable("its input is a tree, not one tensor")
    _refuse_altered_modules(model)
    try:
        # Tracing runs the module's Python; a copy keeps what that may write out of the model.
        graph = fx.Tracer().trace(copy.deepcopy(model))
    except Exception as error:  # forward is arbitrary code: any exception means it can't be read
        raise Unreadable(f"torch.fx can't trace its forward ({_first_line(error)})") from None
    network = _Reader(model).network(graph)
    return _verified(network, model, example)


def _verified(network: Network, model: nn.Module, example: Tensor) -> Network:
    """fx can lie (baked-in sizes, branches taken once): the layers must repeat the module."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        try:
            network = network.measured(tensors, example)
            ours = network.forward(tensors, example)
        except Exception as error:
            raise Unreadable(f"its layers don't run by themselves ({_first_line(error)})") from None
        written = {name: b.clone() for name, b in model.named_buffers()}
        theirs = torch.func.functional_call(model, written, (example,))
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        raise Unreadable("its layers give an output of another shape than the module")
    # Rounding grows with depth; anything past that is another function.
    tolerance = 16 * len(network.nodes) * torch.finfo(theirs.dtype).eps
    scale = theirs.abs().amax().nan_to_num(0.0).clamp_min(1.0)
    if not torch.allclose(ours, theirs, rtol=0, atol=tolerance * float(scale), equal_nan=True):
        raise Unreadable("its layers give another output than the module")
    return network


def _refuse_altered_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        label = name or type(module).__name__
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            raise Unreadable(f"{label} has hooks")
        if hasattr(module, "parametrizations"):
            raise Unreadable(f"{label} is parametrized")
        if "forward" in vars(module):
            raise Unreadable(f"{label} has a forward of its own on the instance")


_BATCH = object()
"""The number of examples, as `x.size(0)` or `x.shape[0]` gives it."""
_SHAPE = object()

_ACTIVATION_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.Softplus: ("softplus", ("beta", "threshold")),
}
_ACTIVATION_OPTIONS = {kind: names for kind, names in _ACTIVATION_MODULES.values()}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, kind): kind for kind in _ACTIVATION_OPTIONS if hasattr(F, kind)},
    **{function: "relu" for function in (torch.relu, torch.relu_, F.relu_)},
    **{function: "tanh" for function in (torch.tanh, F.tanh)},
    **{function: "sigmoid" for function in (torch.sigmoid, F.sigmoid)},
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}
_POOL_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.MaxPool2d: ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    nn.AvgPool2d: (
        "avg_pool2d",
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", ("output_size",)),
}
_POOL_OPTIONS = {kind: names for kind, names in _POOL_MODULES.values()}
_POOL_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, kind): kind for kind in _POOL_OPTIONS},
    torch.max_pool2d: "max_pool2d",
}


class _Reader:
    """One pass over a traced graph."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._canonical = {id(p): name for name, p in model.named_parameters()}
        self._canonical |= {id(b): name for name, b in model.named_buffers()}
        self._tensors = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        self._nodes: list[Node] = []
        self._values: dict[fx.Node, Any] = {}

    def network(self, graph: fx.Graph) -> Network:
        output: Any = None
        inputs = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs += 1
                if inputs > 1 and node.users:
                    raise Unreadable(f"its forward takes {node.name!r} besides its input")
                self._values[node] = -1
            elif node.op == "get_attr":
                self._values[node] = self._tensor_name(node.target)
            elif node.op == "output":
                output = self._value(node.args[0])
            else:
                self._values[node] = self._read(node)
        if not isinstance(output, int):
            raise Unreadable("its output is not one tensor")
        return Network(tuple(self._nodes), output)

    def _read(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            layer = self._module_layer(str(node.target), module)
            return self._append(layer, (self._only_argument(node),), str(node.target))
        if node.op == "call_method":
            return self._method(node)
        return self._function(node)

    def _append(self, layer: Layer, inputs: tuple[int, ...], name: str) -> int:
        if isinstance(layer, layers.Identity):
            return inputs[0]
        self._nodes.append(Node(layer, inputs, name))
        return len(self._nodes) - 1

    def _module_layer(self, name: str, module: nn.Module) -> Layer:
        kind = type(module)
        if kind is nn.Linear:
            return layers.Linear(self._own(name, "weight"), self._maybe_own(name, module.bias, "bias"))
        if kind is nn.Conv2d:
            return self._convolution(name, module)
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            return self._batch_norm(name, module)
        if kind in _ACTIVATION_MODULES:
            function, names = _ACTIVATION_MODULES[kind]
            return layers.Activation(function, _options(module, names))
        if kind in _POOL_MODULES:
            if getattr(module, "return_indices", False):
                raise Unreadable(f"{name} returns its indices")
            function, names = _POOL_MODULES[kind]
            return layers.Pool2d(function, _options(module, names))
        if kind is nn.Flatten:
            return self._flatten(module.start_dim, module.end_dim)
        if kind is nn.Identity or (_is_dropout(module) and not module.training):
            return layers.Identity()
        if _is_dropout(module):
            raise Unreadable(f"{name} is dropout in train(), which the kernels don't draw")
        raise Unreadable(f"{name} is a {kind.__name__}, which is no known layer")

    def _convolution(self, name: str, module: Any) -> Layer:
        if module.padding_mode != "zeros":
            raise Unreadable(f"{name} pads with {module.padding_mode!r}")
        padding = module.padding
        if isinstance(padding, str):
            if padding == "valid":
                padding = (0, 0)
            elif any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size)):
                raise Unreadable(f"{name} pads unevenly")
            else:
                padding = tuple(
                    d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size)
                )
        return layers.Conv2d(
            self._own(name, "weight"),
            self._maybe_own(name, module.bias, "bias"),
            module.stride,
            padding,
            module.dilation,
            module.groups,
        )

    def _batch_norm(self, name: str, module: Any) -> Layer:
        running = module.running_mean is not None
        return layers.BatchNorm(
            self._maybe_own(name, module.weight, "weight"),
            self._maybe_own(name, module.bias, "bias"),
            self._maybe_own(name, module.running_mean, "running_mean"),
            self._maybe_own(name, module.running_var, "running_var"),
            module.eps,
            batch_statistics=module.training or not running,
        )

    def _function(self, node: fx.Node) -> Any:
        target = node.target
        if target is getattr and node.args[1] == "shape":
            self._input(node.args[0])
            return _SHAPE
        if target is operator.getitem and self._value(node.args[0]) is _SHAPE:
            return self._batch_size(node.args[1])
        if target in (operator.add, torch.add, operator.iadd):
            if node.kwargs or len(node.args) != 2:
                raise Unreadable(f"{node.name}: an addition with options")
            left, right = (self._input(arg) for arg in node.args)
            return self._append(layers.Add(), (left, right), node.name)
        if target in _ACTIVATION_FUNCTIONS:
            return self._activation(node, _ACTIVATION_FUNCTIONS[target])
        if target in _POOL_FUNCTIONS:
            return self._pool(node, _POOL_FUNCTIONS[target])
        reader: Callable[[fx.Node], Any] | None = {
            F.linear: self._functional_linear,
            F.conv2d: self._functional_convolution,
            torch.conv2d: self._functional_convolution,
            F.batch_norm: self._functional_batch_norm,
            torch.flatten: self._call_flatten,
            torch.mean: self._call_mean,
            torch.reshape: self._call_view,
        }.get(target)
        if reader is None:
            raise Unreadable(f"{node.name} calls {_name_of(target)}, which is no known layer")
        return reader(node)

    def _method(self, node: fx.Node) -> Any:
        method = str(node.target)
        if method == "size":
            self._input(node.args[0])
            return self._batch_size(node.args[1]) if len(node.args) > 1 else _SHAPE
        if method in _ACTIVATION_METHODS:
            return self._activation(node, _ACTIVATION_METHODS[method])
        if method in ("contiguous", "clone"):
            return self._input(node.args[0])
        reader = {
            "view": self._call_view,
            "reshape": self._call_view,
            "flatten": self._call_flatten,
            "mean": self._call_mean,
            "add": None,
        }.get(method)
        if reader is None:
            raise Unreadable(f"{node.name} calls the method {method!r}, which is no known layer")
        return reader(node)

    def _activation(self, node: fx.Node, kind: str) -> int:
        names = ("input", *_ACTIVATION_OPTIONS[kind])
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        given.pop("inplace", None)
        return self._append_with_options(node, given, layers.Activation, kind)

    def _pool(self, node: fx.Node, kind: str) -> int:
        names = ("input", *_POOL_OPTIONS[kind])
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if given.pop("return_indices", False):
            raise Unreadable(f"{node.name} returns its indices")
        return self._append_with_options(node, given, layers.Pool2d, kind)

    def _append_with_options(self, node: fx.Node, given: dict[str, Any], make: Any, kind: str) -> int:
        source = self._input(given.pop("input"))
        options = tuple((name, _constant(node, value)) for name, value in given.items())
        return self._append(make(kind, options), (source,), node.name)

    def _functional_linear(self, node: fx.Node) -> int:
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        layer = layers.Linear(self._name(given["weight"]), self._maybe_name(given.get("bias")))
        return self._append(layer, (self._input(given["input"]),), node.name)

    def _functional_convolution(self, node: fx.Node) -> int:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if isinstance(given.get("padding"), str):
            raise Unreadable(f"{node.name} pads by name")
        layer = layers.Conv2d(
            self._name(given["weight"]),
            self._maybe_name(given.get("bias")),
            _pair(_constant(node, given.get("stride", 1))),
            _pair(_constant(node, given.get("padding", 0))),
            _pair(_constant(node, given.get("dilation", 1))),
            _constant(node, given.get("groups", 1)),
        )
        return self._append(layer, (self._input(given["input"]),), node.name)

    def _functional_batch_norm(self, node: fx.Node) -> int:
        names = (
            "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps",
        )  # fmt: skip
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        layer = layers.BatchNorm(
            self._maybe_name(given.get("weight")),
            self._maybe_name(given.get("bias")),
            self._maybe_name(given.get("running_mean")),
            self._maybe_name(given.get("running_var")),
            _constant(node, given.get("eps", 1e-5)),
            batch_statistics=bool(_constant(node, given.get("training", False))),
        )
        return self._append(layer, (self._input(given["input"]),), node.name)

    def _call_flatten(self, node: fx.Node) -> int:
        names = ("input", "start_dim", "end_dim")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        layer = self._flatten(
            _constant(node, given.get("start_dim", 0)), _constant(node, given.get("end_dim", -1))
        )
        return self._append(layer, (self._input(given["input"]),), node.name)

    def _flatten(self, start: int, end: int) -> Layer:
        if start < 1:
            raise Unreadable("it flattens examples together")
        return layers.Flatten(start, end)

    def _call_mean(self, node: fx.Node) -> int:
        given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
        dims = _constant(node, given.get("dim"))
        dims = (dims,) if isinstance(dims, int) else dims
        if not dims or any(d == 0 for d in dims):
            raise Unreadable(f"{node.name} takes a mean over examples")
        layer = layers.Mean(tuple(dims), bool(_constant(node, given.get("keepdim", False))))
        return self._append(layer, (self._input(given["input"]),), node.name)

    def _call_view(self, node: fx.Node) -> int:
        source, *sizes = node.args
        if "shape" in node.kwargs:
            sizes = [node.kwargs["shape"]]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        if not sizes:
            raise Unreadable(f"{node.name} views another dtype")
        front, *rest = [self._value(size) if isinstance(size, fx.Node) else size for size in sizes]
        if front is not _BATCH and front != -1:
            raise Unreadable(f"{node.name} bakes a number of examples into its view")
        if not all(isinstance(size, int) for size in rest) or (front == -1 and -1 in rest):
            raise Unreadable(f"{node.name} has a view that depends on the data's shape")
        return self._append(layers.Reshape(tuple(rest)), (self._input(source),), node.name)

    def _batch_size(self, index: Any) -> Any:
        if index != 0:
            raise Unreadable("it reads a size of its input other than the number of examples")
        return _BATCH

    def _value(self, arg: Any) -> Any:
        return self._values[arg] if isinstance(arg, fx.Node) else arg

    def _input(self, arg: Any) -> int:
        value = self._value(arg)
        if not isinstance(arg, fx.Node) or not isinstance(value, int):
            raise Unreadable("an operation reads something that is no layer's output")
        return value

    def _only_argument(self, node: fx.Node) -> int:
        if len(node.args) != 1 or node.kwargs:
            raise Unreadable(f"{node.target} is called with more than its input")
        return self._input(node.args[0])

    def _name(self, arg: Any) -> str:
        value = self._value(arg)
        if not isinstance(value, str):
            raise Unreadable("a layer's weight is computed, not a parameter")
        return value

    def _maybe_name(self, arg: Any) -> str | None:
        return None if arg is None else self._name(arg)

    def _tensor_name(self, target: Any) -> str:
        tensor = self._tensors.get(str(target))
        if tensor is None:
            raise Unreadable(f"it reads {target}, which is neither parameter nor buffer")
        return self._canonical[id(tensor)]

    def _own(self, module: str, name: str) -> str:
        return self._tensor_name(f"{module}.{name}" if module else name)

    def _maybe_own(self, module: str, tensor: Tensor | None, name: str) -> str | None:
        return None if tensor is None else self._own(module, name)


def _options(module: nn.Module, names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, getattr(module, name)) for name in names)


def _constant(node: fx.Node, value: Any) -> Any:
    if isinstance(value, fx.Node):
        raise Unreadable(f"{node.name} has an option that is computed")
    return tuple(value) if isinstance(value, list) else value


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _is_dropout(module: nn.Module) -> bool:
    return type(module) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)


def _name_of(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:120] if text else type(error).__name__
