"""Modules and functions of torch's for which no rules are written: autograd's in their stead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastmeta.network.layers.derivatives import Derivatives
from fastmeta.network.layers.layer import Gradients, Layer, State, Tensors, Wanted
from fastmeta.network.layers.operations import Operation, evaluate
from fastmeta.network.layers.over_tasks import OverTasks

_Rule = Callable[..., Any]
_Name = tuple[Any, ...]
"""A rule with the places that it differentiates by."""
_POINTWISE = ("aten::hardswish", "aten::detach")
"""Elementwise operators that torch does not mark as such."""


@dataclass(frozen=True, eq=False)
class Foreign(Layer):
    """Operations of torch's own, `y = f(x..., w...)`, differentiated one task at a time by `vmap`.

    With g the gradients of `<gy, f>`, the last rule is the gradient of `<g, r> + <rgy, f>`, r being
    the tangents of what moves. Nothing of autograd's stays between two rules. Where `vmap` can't
    map them, tasks go one by one; where f is elementwise, they need no map at all.
    """

    operations: tuple[Operation, ...]
    names: tuple[str, ...]
    """The parameters that it reads."""
    buffers: tuple[str, ...]
    kind: str
    """The operations in words."""
    reason: str
    """Why the first of them is no layer with rules of its own."""
    elementwise: bool = False
    """Whether an entry of its output depends on that entry of its inputs alone."""
    attends: bool = False
    """Whether it runs scaled dot product attention."""
    counted: int = 0
    """FLOP of the pass that it was measured by."""
    runs: OverTasks = field(default_factory=OverTasks, repr=False)

    @property
    def mixes_examples(self) -> bool:
        return not self.elementwise

    def parameters(self) -> tuple[str, ...]:
        return self.names

    def reference(self, tensors: Tensors, *inputs: Tensor) -> Tensor:
        # A module may write its buffers.
        own = {name: tensors[name].clone() for name in self.buffers}
        own.update((name, tensors[name]) for name in self.names)
        return evaluate(self.operations, own, inputs)

    def flops(self, tensors: Tensors, output: Tensor) -> int:
        return self.counted

    def measured(self, tensors: Tensors, *inputs: Tensor) -> Foreign:
        """The same with what one pass shows of it."""
        with _Measure(inputs) as seen:
            self.reference(tensors, *inputs)
        elementwise = seen.elementwise and not self.names
        return replace(
            self, elementwise=elementwise, attends=seen.attends, counted=seen.flops,
            runs=OverTasks(),
        )  # fmt: skip

    def forward(self, state: State, *inputs: Tensor) -> Tensor:
        state.kept.update((f"x{i}", x) for i, x in enumerate(inputs))

        def rule(_: Derivatives, at: _At) -> Tensor:
            return at.function(())()

        return self._over_tasks(("forward",), rule, state, [])

    def backward(self, state: State, wanted: Wanted, gradient: Tensor) -> Gradients:
        state.kept["gradient"] = gradient
        places = self._wanted(state, wanted)

        def rule(how: Derivatives, at: _At, gy: Tensor) -> tuple[Tensor, ...]:
            return how.pull(at.function(places), at.values_at(places), gy)

        return self._gradients(("backward", *places), rule, state, wanted, places, [gradient])

    def tangent(self, state: State, *inputs: Tensor | None) -> Tensor:
        given = {f"r{i}": rx for i, rx in enumerate(inputs) if rx is not None}
        state.kept.update(given)
        moving, r = self._moving(state)

        def rule(how: Derivatives, at: _At, *r: Tensor) -> Tensor:
            return how.push(at.function(moving), at.values_at(moving), r)

        return self._over_tasks(("tangent", *moving), rule, state, r)

    def tangent_backward(self, state: State, wanted: Wanted, tangent: Tensor) -> Gradients:
        moving, r = self._moving(state)
        places = self._wanted(state, wanted)
        both = sorted({*moving, *places})
        among = [both.index(i) for i in places], [both.index(i) for i in moving]

        def rule(
            how: Derivatives, at: _At, gy: Tensor, rgy: Tensor, *r: Tensor
        ) -> tuple[Tensor, ...]:
            return how.pull_tangent(at.function(both), at.values_at(both), *among, r, gy, rgy)

        extra = [state.kept["gradient"], tangent, *r]
        return self._gradients(
            ("tangent_backward", *places, ":", *moving), rule, state, wanted, places, extra
        )

    # A value's place: inputs first, then parameters.

    def _inputs(self, state: State) -> list[Tensor]:
        count = sum(1 for key in state.kept if key[0] == "x")
        return [state.kept[f"x{i}"] for i in range(count)]

    def _wanted(self, state: State, wanted: Wanted) -> list[int]:
        inputs = self._inputs(state)
        found = [i for i, x in enumerate(inputs) if wanted.inputs[i] and x.is_floating_point()]
        parameters = enumerate(self.names, len(inputs))
        return found + [i for i, name in parameters if wanted.parameters.get(name)]

    def _moving(self, state: State) -> tuple[list[int], list[Tensor]]:
        count = len(wanted_inputs := self._inputs(state))
        pairs = [(i, state.kept[f"r{i}"]) for i in range(count) if f"r{i}" in state.kept]
        pairs = [(i, r) for i, r in pairs if wanted_inputs[i].is_floating_point()]
        named = enumerate(self.names, count)
        pairs += [(i, state.tangents[name]) for i, name in named if name in state.tangents]
        return [i for i, _ in pairs], [r for _, r in pairs]

    def _gradients(
        self, name: _Name, rule: _Rule, state: State, wanted: Wanted, places: list[int],
        extra: list[Tensor],
    ) -> Gradients:  # fmt: skip
        count = len(self._inputs(state))
        if not places:
            return (None,) * count, {}
        found = dict(zip(places, self._over_tasks(name, rule, state, extra), strict=True))
        parameters: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.names, count):
            if i in found:
                shared = wanted.parameters[parameter] < len(found[i])
                parameters[parameter] = found[i].sum(0, keepdim=True) if shared else found[i]
        return tuple(found.get(i) for i in range(count)), parameters

    def _over_tasks(self, name: _Name, rule: _Rule, state: State, extra: Sequence[Tensor]) -> Any:
        """What a rule gives for all tasks, `[T, ...]`."""
        inputs, own = self._inputs(state), [state.at[each] for each in self.names]
        tasks = len(inputs[0])
        mapped = [len(each) == tasks > 1 for each in own]
        own = [p if each else p[0] for p, each in zip(own, mapped, strict=True)]
        buffers = [state.at[each][0] for each in self.buffers]
        if not self.elementwise:
            extra = [each.expand(tasks, *each.shape[1:]) for each in extra]
        all_of_them = [*inputs, *own, *buffers, *extra]
        dims = [0] * len(inputs) + [0 if each else None for each in mapped]
        dims += [None] * len(buffers) + [0] * len(extra)
        with sdpa_kernel(SDPBackend.MATH) if self.attends else nullcontext():
            return self.runs.run(self._of_tensors(rule, len(dims) - len(extra)), name, all_of_them,
                                 dims, self.elementwise)  # fmt: skip

    def _of_tensors(self, rule: _Rule, start: int) -> _Rule:
        """A rule as a function of a task's inputs, parameters, buffers; others from `start`."""
        ends = start - len(self.buffers)

        def run(how: Derivatives, *tensors: Tensor) -> Any:
            buffers = dict(zip(self.buffers, tensors[ends:start], strict=True))
            return rule(how, _At(self, [*tensors[:ends]], buffers), *tensors[start:])

        return run


@dataclass(frozen=True, eq=False)
class _At:
    """The operations with all that they read, of one task or under a map over them."""

    layer: Foreign
    values: list[Tensor]
    """Inputs, then parameters."""
    buffers: Tensors

    def values_at(self, places: Sequence[int]) -> list[Tensor]:
        return [self.values[i] for i in places]

    def function(self, places: Sequence[int]) -> Callable[..., Tensor]:
        """The operations as a function of the values at some places."""

        def f(*there: Tensor) -> Tensor:
            values = [*self.values]
            for place, value in zip(places, there, strict=True):
                values[place] = value
            count = len(values) - len(self.layer.names)
            named = dict(zip(self.layer.names, values[count:], strict=True))
            return self.layer.reference({**self.buffers, **named}, *values[:count])

        return f


class _Measure(TorchDispatchMode):
    """Counts the FLOP of operators, and sees whether all are elementwise on tensors of a shape."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops, self.elementwise, self.attends = 0, True, False
        self._shape = inputs[0].shape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif not func.is_view:
            written = pytree.tree_leaves(out)
            self.flops += sum(each.numel() for each in written if isinstance(each, Tensor))
        name = func.name().split(".")[0]
        self.attends |= "scaled_dot_product" in name
        known = torch.Tag.pointwise in func.tags or name in _POINTWISE
        self.elementwise &= known and all(x.shape in ((), self._shape) for x in tensors)
        return out
