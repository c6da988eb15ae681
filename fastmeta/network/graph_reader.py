"""From a graph that `torch.fx` traced to layers, or to why it can't be told."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmeta.network import elementwise, foreign
from fastmeta.network import graph as layers
from fastmeta.network import vocabulary as words
from fastmeta.network.elementwise import Pending
from fastmeta.network.foreign import Fact, called
from fastmeta.network.graph import Layer, Network, Node
from fastmeta.network.layers.elementwise import ENTRY

_SUMS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_ONLY_COLUMN = ((slice(None), 0), (..., 0), (slice(None), -1), (..., -1))
"""Indices by which the one column of `[N, 1]` is taken."""


class Unreadable(Exception):
    """The module's forward holds something that is no known layer; the message says what."""


class Refused(Unreadable):
    """The module itself must run, whatever a part of it could be."""


_BATCH = object()
"""The number of examples, as `x.size(0)` or `x.shape[0]` gives it."""
_SHAPE = object()
_PENDING = object()
"""The value of a call without rules of its own, until a layer reads what it gives."""


class GraphReader:
    """One pass over a traced graph.

    A graph node's value is the index of a layer's output (-1: the input), the name of a parameter
    or buffer, `_SHAPE`, `_BATCH` or `_PENDING`. `facts` tells what each node gives on an example of
    `count` examples; `floating`: whether its input is of real numbers.
    """

    def __init__(
        self, model: nn.Module, facts: Callable[[], dict[fx.Node, Fact]], count: int, floating: bool
    ) -> None:
        self._find_facts, self._count, self._floating = facts, count, floating
        self._reasons: dict[fx.Node, str] = {}
        """By pending node, why it is no known layer."""
        self._parameters = {name for name, _ in model.named_parameters()}
        self._modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        own = [*model.named_parameters(), *model.named_buffers()]
        canonical = {id(tensor): name for name, tensor in own}
        shared = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self._names = {name: canonical[id(tensor)] for name, tensor in shared}
        self._sizes = {name: tuple(tensor.shape) for name, tensor in own}
        self._nodes: list[Node] = []
        self._values: dict[Any, Any] = {}

    def network(self, graph: fx.Graph) -> Network:
        """All of the graph."""
        output: Any = None
        for i, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                if i > 0 and node.users:
                    raise Unreadable(f"its forward takes {node.name!r} besides its input")
                self._values[node] = -1
            elif node.op == "get_attr":
                self._values[node] = self._tensor(node.target)
            elif node.op == "output":
                output = self._value(node.args[0])
                if output is _PENDING or isinstance(output, Pending):
                    output = self._input(node.args[0])
            else:
                expression = self._expression(node)
                known = self._known_or_pending(node) if expression is None else expression
                self._values[node] = known
        if not isinstance(output, int):
            raise Unreadable("its output is not one tensor")
        network = Network(tuple(self._nodes), output)
        self._check_worth(network)
        return network

    def _check_worth(self, network: Network) -> None:
        """**Raises** where nothing with parameters has rules: then the module itself may run."""
        needed = network.needed()
        read = [network.nodes[i].layer for i in needed]
        strangers = [layer for layer in read if isinstance(layer, layers.Foreign)]
        known = [layer for layer in read if not isinstance(layer, layers.Foreign)]
        if strangers and not any(layer.parameters() for layer in known):
            raise Unreadable(strangers[0].reason)

    def _expression(self, node: fx.Node) -> Pending | int | None:
        found = elementwise.read(node, self._values, self._modules)
        if found and found.source == -1 and not self._floating:
            return None  # arithmetic of integers, which another function does
        if found and getattr(self._modules.get(str(node.target)), "inplace", False):
            self._check_sole_reader(node)
        return found.source if found and found.expression is ENTRY else found

    def _known_or_pending(self, node: fx.Node) -> Any:
        try:
            return self._read(node)
        except Refused:
            raise
        except Unreadable as error:
            why = foreign.refusal(node, self._modules)
            if why is None and node not in self._facts:  # it gives no tensor
                raise
            if why is None and self._facts[node].writes:
                why = f"{node.name} changes in place what others read"
            if why is not None:
                raise Unreadable(f"{error}; {why}") from None
            self._reasons[node] = str(error)
            return _PENDING

    @functools.cached_property
    def _facts(self) -> dict[fx.Node, Fact]:
        try:
            return self._find_facts()
        except Exception as error:
            raise Unreadable(f"its trace does not run by itself ({error})") from None

    def _foreign(self, root: fx.Node) -> int:
        """Make a node of a pending call, with the pending ones that lead to it."""
        if not self._facts[root].leads_with(self._count):
            raise Unreadable(self._reasons[root])
        run = self._leading_to(root)
        for node in run[:-1]:
            # Others read it too: computed once.
            shared = any(user not in run for user in node.users)
            if shared and node in self._reasons and self._facts[node].leads_with(self._count):
                self._foreign(node)
                return self._foreign(root)
        layer, sources = foreign.layer(
            run, self._values, self._reasons, self._modules, self._names, self._parameters
        )
        if not sources:
            raise Unreadable(self._reasons[root])
        module = next((str(node.target) for node in run if node.op == "call_module"), None)
        self._nodes.append(Node(layer, sources, module or root.name))
        self._values[root] = len(self._nodes) - 1
        return self._values[root]

    def _leading_to(self, root: fx.Node) -> list[fx.Node]:
        """The calls that must run for the root's, in order, and the root."""
        found, waiting = {root}, [root]
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if isinstance(self._values[node], Pending):
                    self._input(node)
                if node not in found and not isinstance(self._values[node], (int, str)):
                    found.add(node)
                    waiting.append(node)
        return [node for node in self._values if node in found]

    def _read(self, node: Any) -> Any:
        if node.op == "call_module":
            module = self._modules[node.target]
            if type(module) is nn.Dropout:
                return self._dropout(node, module.p, module.training, module.inplace)
            if foreign.draws(module):
                kind = "dropout" if isinstance(module, words.DROPOUTS) else type(module).__name__
                raise Refused(
                    f"layer {node.target!r} ({kind}) is in train(), and the kernels draw no random "
                    "numbers; call eval() on it, or give it p=0"
                )
            if getattr(module, "inplace", False):
                self._check_sole_reader(node)
            layer = self._module_layer(node.target, module)
            if len(node.args) != 1 or node.kwargs:
                raise Unreadable(f"{node.target} is called with more than its input")
            return self._append(layer, [node.args[0]], node.target)
        if node.op == "call_method":
            return self._method(node)
        return self._function(node)

    def _append(self, layer: Layer, inputs: list[Any], name: str) -> int:
        sources = tuple(self._input(arg) for arg in inputs)
        if isinstance(layer, layers.Identity):
            return sources[0]
        self._nodes.append(Node(layer, sources, name))
        return len(self._nodes) - 1

    def _module_layer(self, name: str, module: Any) -> Layer:
        kind = type(module)
        if kind is nn.Linear:
            return layers.Linear(
                self._tensor(f"{name}.weight"), self._of_module(name, module, "bias")
            )
        if kind is nn.Conv2d:
            return self._convolution(name, module)
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            return self._batch_norm(name, module)
        if kind in (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm):
            return self._example_norm(name, module)
        if kind in words.ACTIVATION_MODULES:
            function, options = words.ACTIVATION_MODULES[kind]
            return layers.Activation(function, words.module_options(module, options))
        if kind in words.POOL_MODULES:
            if getattr(module, "return_indices", False):
                raise Unreadable(f"{name} returns its indices")
            function, options = words.POOL_MODULES[kind]
            return layers.Pool2d(function, words.module_options(module, options))
        if kind is nn.Flatten:
            return _flatten(module.start_dim, module.end_dim)
        if kind is nn.Identity or kind in words.DROPOUTS:
            return layers.Identity()
        raise Unreadable(f"layer {name!r} ({kind.__name__}) is none that the kernels know")

    def _convolution(self, name: str, module: Any) -> Layer:
        if module.padding_mode != "zeros":
            raise Unreadable(
                f"layer {name!r} pads with {module.padding_mode!r}; the kernels know 'zeros'"
            )
        return layers.Conv2d(
            self._tensor(f"{name}.weight"),
            self._of_module(name, module, "bias"),
            _pair(module.stride),
            _padding(module.padding, module.kernel_size, _pair(module.dilation)),
            _pair(module.dilation),
            module.groups,
        )

    def _batch_norm(self, name: str, module: Any) -> Layer:
        return layers.BatchNorm(
            self._of_module(name, module, "weight"),
            self._of_module(name, module, "bias"),
            self._of_module(name, module, "running_mean"),
            self._of_module(name, module, "running_var"),
            module.eps,
            batch_statistics=module.training or module.running_mean is None,
        )

    def _example_norm(self, name: str, module: Any) -> Layer:
        scale = self._of_module(name, module, "weight")
        if type(module) is nn.RMSNorm:
            return layers.RMSNorm(tuple(module.normalized_shape), scale, module.eps)
        shift = self._of_module(name, module, "bias")
        if type(module) is nn.GroupNorm:
            return layers.GroupNorm(module.num_groups, scale, shift, module.eps)
        return layers.LayerNorm(tuple(module.normalized_shape), scale, shift, module.eps)

    def _function(self, node: Any) -> Any:
        target = node.target
        if target is getattr and node.args[1] == "shape":
            self._input(node.args[0])
            return _SHAPE
        if target is operator.getitem and self._value(node.args[0]) is _SHAPE:
            return _batch_size(node.args[1])
        if (
            target is operator.getitem
            and node.args[1] in _ONLY_COLUMN
            and self._is_column(node.args[0])
        ):
            return self._append(self._without(node.args[0], 1), [node.args[0]], node.name)
        if target in _PRODUCTS + _SUMS:
            if node.kwargs or len(node.args) != 2:
                raise Unreadable(f"{node.name}: a sum or product with options")
            if target in (operator.iadd, operator.imul):
                self._check_sole_reader(node)
            by_column = self._by_column(node)
            if by_column is not None:
                return by_column
        if target in _SUMS:
            self._check_same_shape(node)
            return self._append(layers.Add(), list(node.args), node.name)
        if target is F.dropout:
            given = _named(node, ("input", "p", "training", "inplace"))
            p, training = given.get("p", 0.5), given.get("training", True)
            return self._dropout(node, p, training, given.get("inplace", False))
        if target in words.ACTIVATION_FUNCTIONS:
            return self._with_options(node, layers.Activation, words.ACTIVATION_FUNCTIONS[target])
        if target in words.POOL_FUNCTIONS:
            return self._with_options(node, layers.Pool2d, words.POOL_FUNCTIONS[target])
        if target in words.FUNCTIONS:
            return self._call(node, words.FUNCTIONS[target])
        name = getattr(target, "__name__", str(target))
        raise Unreadable(f"its forward calls {name}, which the kernels do not know")

    def _dropout(self, node: fx.Node, p: float, training: bool, inplace: bool) -> int:
        if not node.args:
            raise Unreadable(f"{node.name} names its input")
        source = node.args[0]
        if inplace:
            self._check_sole_reader(node)
        if not training or p == 0:
            return self._input(source)
        if p == 1:
            raise Refused(f"{node.name} leaves out everything")
        return self._append(layers.Dropout(float(p)), [source], node.name)

    def _by_column(self, node: fx.Node) -> int | None:
        """The layer of a sum or product with a parameter of a number a column, if it is one."""
        names = [arg for arg in node.args if self._value(arg) in self._parameters]
        others = [arg for arg in node.args if arg not in names]
        if len(names) != 1 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        name = self._parameter(names[0])
        shape = self._facts[node].shape
        if shape is None or len(shape) < 2 or self._sizes[name] != shape[-1:]:
            return None
        if self._facts[others[0]].shape != shape:
            return None
        layer = layers.Shift(name) if node.target in _SUMS else layers.Scale(name)
        return self._append(layer, others, node.name)

    def _check_same_shape(self, node: fx.Node) -> None:
        """**Raises** for a sum that broadcasts, or that may as well be a part of other calls."""
        terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(terms) < 2 or len({self._facts[term].shape for term in terms}) > 1:
            raise Unreadable(f"{node.name} adds values of different shapes")
        if any(self._values[term] is _PENDING for term in terms):
            raise Unreadable(f"{node.name} adds to what has no rules")

    def _check_sole_reader(self, node: Any) -> None:
        """**Raises** where others see what a call changes in place."""
        changed = node.args[0]
        while isinstance(changed, fx.Node):
            if changed.op == "placeholder" or len(changed.users) > 1:
                raise Refused(f"{node.name} changes in place what others read")
            if not self._may_be_a_view(changed):
                return
            changed = changed.args[0]

    def _may_be_a_view(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            kind = type(self._modules[str(node.target)])
            return kind in (nn.Flatten, nn.Identity, *words.DROPOUTS)
        return called(node) in ("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous")

    def _method(self, node: Any) -> Any:
        method = node.target
        if method == "size":
            self._input(node.args[0])
            return _batch_size(node.args[1]) if len(node.args) > 1 else _SHAPE
        if method in words.PASSING_METHODS:
            return self._input(node.args[0])
        if method in words.ACTIVATION_METHODS:
            return self._with_options(node, layers.Activation, words.ACTIVATION_METHODS[method])
        if method in words.METHODS:
            return self._call(node, words.METHODS[method])
        raise Unreadable(f"its forward calls the method {method!r}, which the kernels do not know")

    def _with_options(self, node: Any, make: Any, kind: str) -> int:
        given = _named(node, ("input", *words.OPTIONS[kind]))
        if given.pop("inplace", False) or called(node).endswith("_"):
            self._check_sole_reader(node)
        if given.pop("return_indices", False):
            raise Unreadable(f"{node.name} returns its indices")
        source = given.pop("input")
        # No module's name: the options of modules alone are arguments of a step.
        return self._append(make(kind, tuple(given.items())), [source], f"{node.name}()")

    def _call(self, node: Any, kind: str) -> int:
        """A layer whose options, or tensors, stand in the call itself."""
        if kind == "view":
            source, *sizes = node.args
            layer = self._view(node, sizes or [node.kwargs.get("shape")])
            return self._append(layer, [source], node.name)
        given = _named(node, words.ARGUMENTS[kind])
        source = given.pop("input")
        if kind == "squeeze":
            layer = self._without(source, given.get("dim"))
        elif kind == "flatten" and self._joins_column(source, given):
            layer = layers.Reshape(())
        elif kind == "flatten":
            layer = _flatten(given.get("start_dim", 0), given.get("end_dim", -1))
        elif kind == "mean":
            layer = _mean(node, given.get("dim"), given.get("keepdim", False))
        else:
            tensors = {
                name: None if given.get(name) is None else self._parameter(given[name])
                for name in ("weight", "bias", "running_mean", "running_var")
            }
            layer = self._functional(kind, given, tensors)
        return self._append(layer, [source], node.name)

    def _is_column(self, source: Any) -> bool:
        """Return whether a value is one number an example, `[N, 1]`."""
        return isinstance(source, fx.Node) and self._facts[source].shape == (self._count, 1)

    def _joins_column(self, source: Any, given: dict[str, Any]) -> bool:
        """Return whether a call of flatten makes `[N]` of `[N, 1]`."""
        dims = given.get("start_dim", 0), given.get("end_dim", -1)
        return dims in ((0, -1), (0, 1)) and self._is_column(source)

    def _without(self, source: Any, dim: Any) -> Layer:
        """The view without a dimension of one; **raises** where there is no such."""
        shape = self._facts[source].shape if isinstance(source, fx.Node) else None
        dim = dim % len(shape) if shape and isinstance(dim, int) else 0
        if not shape or dim == 0 or shape[dim] != 1:
            raise Unreadable("it takes away a dimension that is not one of size 1 behind the first")
        return layers.Reshape(shape[1:dim] + shape[dim + 1 :])

    def _functional(
        self, kind: str, given: dict[str, Any], tensors: dict[str, str | None]
    ) -> Layer:
        weight, bias = tensors["weight"], tensors["bias"]
        eps = given.get("eps", 1e-5)
        if kind == "batch_norm":
            mean, variance = tensors["running_mean"], tensors["running_var"]
            training = bool(given.get("training", False))
            return layers.BatchNorm(weight, bias, mean, variance, eps, training)
        if kind == "group_norm":
            return layers.GroupNorm(given["num_groups"], weight, bias, eps)
        if kind == "layer_norm":
            return layers.LayerNorm(tuple(given["normalized_shape"]), weight, bias, eps)
        if kind == "rms_norm":
            return layers.RMSNorm(tuple(given["normalized_shape"]), weight, given.get("eps"))
        if weight is None:
            raise Unreadable(f"a call of {kind} without a weight")
        if kind == "linear":
            return layers.Linear(weight, bias)
        stride, dilation = (_pair(given.get(name, 1)) for name in ("stride", "dilation"))
        padding = _padding(given.get("padding", 0), self._sizes[weight][2:], dilation)
        return layers.Conv2d(weight, bias, stride, padding, dilation, given.get("groups", 1))

    def _view(self, node: Any, sizes: list[Any]) -> Layer:
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        front, *rest = [self._value(size) for size in sizes]
        if front is not _BATCH and (front != -1 or isinstance(sizes[0], fx.Node)):
            raise Unreadable(f"{node.name} bakes a number of examples into its view")
        if any(isinstance(size, fx.Node) or not isinstance(size, int) for size in sizes[1:]):
            raise Unreadable(f"{node.name} has a view that depends on the data's shape")
        if front == -1 and -1 in rest:
            raise Unreadable(f"{node.name} leaves two sizes open")
        return layers.Reshape(tuple(rest))

    def _value(self, arg: Any) -> Any:
        return self._values[arg] if isinstance(arg, fx.Node) else arg

    def _input(self, arg: Any) -> int:
        value = self._value(arg)
        if value is _PENDING:
            return self._foreign(arg)
        if isinstance(value, Pending):
            if value.layer is None:
                value.layer = self._computed(value.call, value)
            self._values[arg] = value = value.layer
        if not isinstance(arg, fx.Node) or not isinstance(value, int):
            raise Unreadable("an operation reads something that is no layer's output")
        return value

    def _computed(self, node: fx.Node, value: Pending) -> int:
        """The layer of an expression: torch's own activation where it is one."""
        kind = type(self._modules.get(str(node.target)))
        activations = (words.ACTIVATION_FUNCTIONS, words.ACTIVATION_METHODS)
        known = any(node.target in names for names in activations) or (
            node.op == "call_module" and kind in words.ACTIVATION_MODULES
        )
        if known and isinstance(self._value(node.args[0]), int):
            return self._read(node)
        self._nodes.append(Node(layers.Elementwise(value.expression), (value.source,), node.name))
        return len(self._nodes) - 1

    def _parameter(self, arg: Any) -> str:
        value = self._value(arg)
        if not isinstance(value, str):
            raise Unreadable("a layer's weight is computed, not a parameter")
        return value

    def _tensor(self, name: Any) -> str:
        if name not in self._names:
            raise Unreadable(f"it reads {name}, which is neither parameter nor buffer")
        return self._names[name]

    def _of_module(self, module_name: str, module: Any, name: str) -> str | None:
        return None if getattr(module, name) is None else self._tensor(f"{module_name}.{name}")


def _named(node: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name; only the tensors may be computed."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    tensors = ("input", "weight", "bias", "running_mean", "running_var")
    for name, value in given.items():
        if isinstance(value, fx.Node) and name not in tensors:
            raise Unreadable(f"{node.name} has an option that is computed")
        if isinstance(value, list):
            given[name] = tuple(value)
    return given


def _padding(given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, int]:
    """Zeros on each side, out of numbers or a name."""
    if given == "valid":
        return 0, 0
    if given != "same":
        return _pair(given)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(span % 2 for span in spans):
        raise Unreadable("a convolution pads one side more than the other")
    return _pair(tuple(span // 2 for span in spans))


def _flatten(start: Any, end: Any) -> Layer:
    if start < 1:
        raise Unreadable("it flattens examples together")
    return layers.Flatten(start, end)


def _mean(node: Any, dims: Any, keepdim: Any) -> Layer:
    dims = (dims,) if isinstance(dims, int) else dims
    if not dims or 0 in dims:
        raise Unreadable(f"{node.name} takes a mean over examples")
    return layers.Mean(tuple(dims), bool(keepdim))


def _batch_size(index: Any) -> object:
    if index != 0:
        raise Unreadable("it reads a size of its input other than the number of examples")
    return _BATCH


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (tuple, list)) else (value,)
    return int(first), int((rest or [first])[0])
