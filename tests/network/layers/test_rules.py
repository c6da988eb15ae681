"""Every layer's four rules against float64 autograd, on sizes that are odd in every way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

from fastmeta.network import layers
from fastmeta.network.layers import Batch, Layer, State, Wanted

CLOSE: Any = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Case:
    """A layer with the shapes of one task's examples and parameters, and of buffers."""

    name: str
    layer: Layer
    inputs: tuple[tuple[int, ...], ...]
    parameters: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...] = ()
    reference: Layer | None = None
    """Another layer of the same values."""


def conv(
    inputs: int, outputs: int, kernel: Any, size: tuple[int, int], bias: bool = True,
    stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1,
) -> Case:  # fmt: skip
    layer = layers.Conv2d("w", "b" if bias else None, stride, padding, dilation, groups)
    shapes: dict[str, tuple[int, ...]] = {"w": (outputs, inputs // groups, *kernel)}
    name = f"conv-{inputs}-{outputs}-{kernel}-{size}-{stride}-{padding}-{dilation}-{groups}"
    return Case(name, layer, ((inputs, *size),), {**shapes, "b": (outputs,)} if bias else shapes)


def norm(
    name: str, make: Callable[..., Layer], shape: tuple[int, ...], affine: tuple[int, ...] | None
) -> Case:
    names = {"w": affine, "b": affine} if affine else {}
    return Case(name, make(*(names or (None, None))), (shape,), names)


def batch_norm(w: str | None, b: str | None) -> Layer:
    return layers.BatchNorm(w, b, None, None, 1e-3, True)


def running_norm(w: str | None, b: str | None) -> Layer:
    return layers.BatchNorm(w, b, "mean", "variance", 1e-3, False)


def group_norm(groups: int) -> Callable[..., Layer]:
    return lambda w, b: layers.GroupNorm(groups, w, b, 1e-3)


def layer_norm(*shape: int) -> Callable[..., Layer]:
    return lambda w, b: layers.LayerNorm(shape, w, b, 1e-3)


def pool(kind: str, size: tuple[int, ...], **options: Any) -> Case:
    layer = layers.Pool2d(kind, tuple(options.items()))
    return Case(f"{kind}-{size}-{options}", layer, (size,), {})


class ShiftedNorm(Layer):
    """Torch itself can't differentiate a batch norm with a shift and no scale so often."""

    def reference(self, tensors: Any, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        dims = (0, *range(2, x.dim()))
        h = x - x.mean(dims, keepdim=True)
        h = h * (h.square().mean(dims, keepdim=True) + 1e-3).rsqrt()
        return h + tensors["b"].view(-1, *(1,) * (x.dim() - 2))


ACTIVATIONS = [
    ("relu", {}), ("leaky_relu", {"negative_slope": 0.2}), ("tanh", {}), ("sigmoid", {}),
    ("elu", {"alpha": 0.7}), ("softplus", {"beta": 2.0, "threshold": 1.0}), ("silu", {}),
    ("gelu", {"approximate": "none"}), ("gelu", {"approximate": "tanh"}),
]  # fmt: skip

CASES = [
    Case("linear", layers.Linear("w", "b"), ((5,),), {"w": (3, 5), "b": (3,)}),
    Case("linear-no-bias", layers.Linear("w", None), ((1,),), {"w": (1, 1)}),
    Case("linear-of-pixels", layers.Linear("w", "b"), ((2, 3, 4),), {"w": (5, 4), "b": (5,)}),
    conv(1, 1, (1, 1), (1, 1)),
    conv(3, 2, (3, 3), (5, 7), padding=(1, 1)),
    conv(2, 3, (2, 3), (7, 5), stride=(2, 3), padding=(1, 0)),
    conv(2, 4, (2, 2), (9, 8), stride=(3, 3), bias=False),  # stride past the kernel
    conv(1, 4, (3, 3), (1, 1), padding=(1, 1)),
    conv(4, 4, (3, 3), (5, 5), groups=4, padding=(1, 1)),
    conv(4, 6, (3, 2), (7, 6), groups=2, dilation=(2, 1), stride=(1, 2)),
    conv(16, 24, (3, 3), (65, 64)),  # past the size where tasks go as groups
    norm("batch-norm-rows", batch_norm, (4,), (4,)),
    norm("batch-norm-images", batch_norm, (3, 4, 5), (3,)),
    norm("batch-norm-plain", batch_norm, (1, 3, 1), None),
    norm("batch-norm-sequences", batch_norm, (2, 5), (2,)),
    Case("batch-norm-shift", layers.BatchNorm(None, "b", None, None, 1e-3, True), ((3, 2, 2),),
         {"b": (3,)}, reference=ShiftedNorm()),
    Case("running-norm", running_norm("w", "b"), ((3, 2, 3),), {"w": (3,), "b": (3,)},
         ("mean", "variance")),
    Case("running-norm-plain", running_norm(None, None), ((3,),), {}, ("mean", "variance")),
    norm("group-norm", group_norm(2), (4, 3, 2), (4,)),
    norm("group-norm-of-one", group_norm(1), (1, 3, 3), None),
    norm("group-norm-rows", group_norm(3), (6,), (6,)),
    norm("layer-norm", layer_norm(5), (3, 5), (5,)),
    norm("layer-norm-images", layer_norm(2, 3, 4), (2, 3, 4), (2, 3, 4)),
    norm("layer-norm-plain", layer_norm(4), (4,), None),
    *(Case(f"{k}-{o}", layers.Activation(k, tuple(o.items())), ((3, 5),), {})
      for k, o in ACTIVATIONS),
    pool("max_pool2d", (2, 5, 7), kernel_size=2),
    pool("max_pool2d", (1, 7, 5), kernel_size=3, stride=2, padding=1),
    pool("max_pool2d", (2, 6, 6), kernel_size=(2, 3), stride=(3, 2), ceil_mode=True),
    pool("max_pool2d", (1, 7, 7), kernel_size=2, stride=1, dilation=2),
    pool("avg_pool2d", (2, 5, 6), kernel_size=2),
    pool("avg_pool2d", (1, 5, 5), kernel_size=3, stride=2, padding=1, count_include_pad=False),
    pool("avg_pool2d", (1, 6, 6), kernel_size=2, stride=3, divisor_override=3),
    pool("adaptive_avg_pool2d", (2, 5, 4), output_size=(2, 3)),
    pool("adaptive_avg_pool2d", (2, 5, 4), output_size=1),
    Case("mean", layers.Mean((2, 3), False), ((3, 4, 5),), {}),
    Case("mean-kept", layers.Mean((1,), True), ((3, 4),), {}),
    Case("flatten", layers.Flatten(1, -1), ((2, 3, 4),), {}),
    Case("flatten-part", layers.Flatten(1, 2), ((2, 3, 4),), {}),
    Case("reshape", layers.Reshape((6, -1)), ((2, 3, 4),), {}),
    Case("add", layers.Add(), ((2, 3), (2, 3)), {}),
]  # fmt: skip


@dataclass
class Point:
    """A case's tensors for T tasks, and the tangents of all that has one."""

    case: Case
    tasks: int
    count: int
    inputs: list[Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradient: Tensor
    along_inputs: list[Tensor]
    along: dict[str, Tensor]
    along_gradient: Tensor

    def task(self, i: int) -> tuple[Tensor, ...]:
        return (
            *(x[i] for x in self.inputs),
            *(p[min(i, len(p) - 1)] for p in self.parameters.values()),
        )

    def along_task(self, i: int) -> tuple[Tensor, ...]:
        return (*(x[i] for x in self.along_inputs), *(p[i] for p in self.along.values()))

    def output(self, i: int, *tensors: Tensor) -> Tensor:
        inputs = tensors[: len(self.inputs)]
        named = dict(zip(self.parameters, tensors[len(self.inputs) :], strict=True))
        buffers = {name: b[0] for name, b in self.buffers.items()}
        layer = self.case.reference or self.case.layer
        return layer.reference({**named, **buffers}, *inputs)

    def gradients(self, i: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, gradient = tensors
        y = self.output(i, *leaves)
        found = torch.autograd.grad(y, leaves, gradient, create_graph=True, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if g is None else g
            for g, leaf in zip(found, leaves, strict=True)
        )


def draw(case: Case, tasks: int, count: int, shared: bool) -> Point:
    def one(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inputs = [one(tasks, count, *shape) for shape in case.inputs]
    parameters = {n: one(1 if shared else tasks, *s) for n, s in case.parameters.items()}
    channels = case.inputs[0][0]
    buffers = {n: 0.5 + torch.rand(1, channels, dtype=torch.float64) for n in case.buffers}
    point = Point(
        case, tasks, count, inputs, parameters, buffers, one(0),
        [one(*x.shape) for x in inputs],
        {n: one(tasks, *s) for n, s in case.parameters.items()}, one(0),
    )  # fmt: skip
    shape = point.output(0, *point.task(0)).shape
    point.gradient, point.along_gradient = one(tasks, *shape), one(tasks, *shape)
    return point


def four_rules(point: Point, count: int, first: bool = False) -> tuple[Any, ...]:
    """What the rules give; `first` is a layer whose input is data."""
    case, tasks = point.case, point.tasks
    state = State({**point.parameters, **point.buffers}, Batch(tasks, point.count))
    wanted = Wanted(tuple(not first for _ in case.inputs), dict.fromkeys(case.parameters, count))
    y = case.layer.forward(state, *point.inputs)
    back = case.layer.backward(state, wanted, point.gradient)
    state.tangents = point.along
    ry = case.layer.tangent(state, *[None if first else x for x in point.along_inputs])
    rback = case.layer.tangent_backward(state, wanted, point.along_gradient)
    return y, back, ry, rback


def expected(point: Point, first: bool = False) -> tuple[list[Any], ...]:
    """The same for each task by autograd."""
    found: tuple[list[Any], ...] = ([], [], [], [])
    for i in range(point.tasks):
        at, along = point.task(i), point.along_task(i)
        if first:
            given = len(point.inputs)
            along = (*(torch.zeros_like(x) for x in along[:given]), *along[given:])
        output = lambda *tensors, i=i: point.output(i, *tensors)  # noqa: E731
        gradients = lambda *tensors, i=i: point.gradients(i, *tensors)  # noqa: E731
        v, rv = point.gradient[i], point.along_gradient[i]
        y, ry = jvp(output, at, along)
        back, rback = jvp(gradients, (*at, v), (*along, rv))
        for part, value in zip(found, (y, back, ry, rback), strict=True):
            part.append(value)
    return found


def agree(point: Point, count: int, first: bool = False) -> None:
    y, back, ry, rback = four_rules(point, count, first)
    expect = expected(point, first)
    torch.testing.assert_close(y, torch.stack(expect[0]), **CLOSE)
    torch.testing.assert_close(ry, torch.stack(expect[2]), **CLOSE)
    for got, wanted in ((back, expect[1]), (rback, expect[3])):
        inputs, parameters = got
        for k, gradient in enumerate(inputs):
            if first:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, torch.stack([w[k] for w in wanted]), **CLOSE)
        assert list(parameters) == list(point.parameters)
        for k, gradient in enumerate(parameters.values(), len(inputs)):
            each = torch.stack([w[k] for w in wanted])
            want = each if count == point.tasks else each.sum(0, keepdim=True)
            torch.testing.assert_close(gradient, want, **CLOSE)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(("tasks", "count"), [(3, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_four_rules(case: Case, tasks: int, count: int, shared: bool) -> None:
    rows = count * torch.Size(case.inputs[0][1:]).numel()
    if isinstance(case.layer, layers.BatchNorm) and rows == 1:
        count = 2  # one number has no variance: torch refuses it
    point = draw(case, tasks, count, shared)
    agree(point, tasks)
    agree(point, 1)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.parameters], ids=lambda case: case.name
)
def test_a_first_layer_makes_nothing_of_its_input(case: Case) -> None:
    agree(draw(case, 2, 3, True), 2, first=True)


@pytest.mark.parametrize("moving", ["w", "b"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if len(case.parameters) == 2], ids=lambda case: case.name
)
def test_one_parameter_alone_has_a_tangent(case: Case, moving: str) -> None:
    point = draw(case, 2, 3, False)
    point.along = {n: t if n == moving else torch.zeros_like(t) for n, t in point.along.items()}
    expect = expected(point)
    point.along = {moving: point.along[moving]}
    _, _, ry, (inputs, parameters) = four_rules(point, 2)
    torch.testing.assert_close(ry, torch.stack(expect[2]), **CLOSE)
    for k, gradient in enumerate([*inputs, *parameters.values()]):
        torch.testing.assert_close(gradient, torch.stack([w[k] for w in expect[3]]), **CLOSE)


@pytest.mark.parametrize("count", [4, 1])
@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("batch-norm")],
                         ids=lambda case: case.name)  # fmt: skip
def test_batch_norm_a_row_at_a_time(
    case: Case, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large sets go on a CPU, in parts; others at once."""
    monkeypatch.setattr("fastmeta.network.layers.rows._BYTES", 1)
    agree(draw(case, 3, max(count, 2 if len(case.inputs[0]) == 1 else 1), False), 3)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Activation("relu"), layers.Activation("leaky_relu", (("negative_slope", 0.3),)),
        layers.Activation("elu", (("alpha", 0.5),)),
        layers.Pool2d("max_pool2d", (("kernel_size", 2),)),
    ],
    ids=str,
)  # fmt: skip
def test_ties_and_corners_fall_as_torch_lets_them(layer: Layer) -> None:
    case = Case("ties", layer, ((2, 4, 4),), {})
    point = draw(case, 2, 3, True)
    x = torch.randint(-1, 2, (2, 3, 2, 4, 4)).double()  # zeros, and maxima that are tied
    point.inputs = [x]
    y, (inputs, _), ry, _ = four_rules(point, 2)
    leaf = x.clone().requires_grad_()
    out = layer.reference({}, leaf.flatten(0, 1)).unflatten(0, (2, 3))
    (dx,) = torch.autograd.grad(out, leaf, point.gradient, create_graph=True)
    torch.testing.assert_close(y, out.detach(), rtol=0, atol=0)
    torch.testing.assert_close(inputs[0], dx.detach(), **CLOSE)
    # The tangent is the transpose of the same choice.
    forward = (point.gradient * ry).sum()
    torch.testing.assert_close(forward, (dx.detach() * point.along_inputs[0]).sum(), **CLOSE)


def test_nan_is_a_maximum() -> None:
    layer = layers.Pool2d("max_pool2d", (("kernel_size", 2),))
    x = torch.zeros(1, 1, 1, 2, 2, dtype=torch.float64)
    x[..., 1, 1] = torch.nan
    assert layer.forward(State({}, Batch(1, 1)), x).isnan().all()
