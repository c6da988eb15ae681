"""Modules read into layers: as modules, functions and methods; and what can't be read, and why."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.network import graph as layers
from fastmeta.network.reader import Unreadable, read

ROWS = torch.randn(4, 6)
IMAGES = torch.randn(4, 2, 8, 8)


def kinds(model: nn.Module, example: Tensor) -> list[str]:
    network = read(model, example)
    return [getattr(node.layer, "kind", type(node.layer).__name__) for node in network.nodes]


class Functional(nn.Module):
    """The same network once more, by functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(3))
        self.scale, self.shift = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.head = nn.Parameter(torch.randn(5, 27))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.weight, self.bias, padding=1, stride=(1, 1))
        h = F.batch_norm(h, None, None, self.scale, self.shift, training=True, eps=1e-3)
        h = F.max_pool2d(F.leaky_relu(h, 0.1), 3, 2)
        h = torch.tanh(h).relu()
        return F.linear(h.reshape(h.shape[0], -1), self.head)


class Views(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = {
            "flatten": lambda: x.flatten(1),
            "torch.flatten": lambda: torch.flatten(x, 1),
            "size": lambda: x.view(x.size(0), -1),
            "size()": lambda: x.view(x.size()[0], -1),
            "shape": lambda: x.reshape(x.shape[0], 128),
            "minus-one": lambda: x.view(-1, 128),
            "tuple": lambda: torch.reshape(x, (x.shape[0], -1)),
        }[self.how]()
        return self.head(h)


class Means(nn.Module):
    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x) + self.second(x))


def test_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    network = read(model, ROWS)
    assert [type(node.layer) for node in network.nodes] == [
        layers.Linear, layers.Activation, layers.Linear,
    ]  # fmt: skip
    assert network.nodes[0].layer == layers.Linear("0.weight", "0.bias")
    assert [node.shape for node in network.nodes] == [(5,), (5,), (3,)]
    assert [node.flops for node in network.nodes] == [60, 5, 30]


def test_functions_and_methods() -> None:
    assert kinds(Functional(), IMAGES) == [
        "Conv2d", "BatchNorm", "leaky_relu", "max_pool2d", "Elementwise", "Reshape", "Linear",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "how", ["flatten", "torch.flatten", "size", "size()", "shape", "minus-one", "tuple"]
)
def test_views(how: str) -> None:
    assert kinds(Views(how), IMAGES)[1:] == ["Linear"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.Tanh(), nn.Sigmoid(), nn.GELU(),
        nn.GELU(approximate="tanh"), nn.SiLU(), nn.ELU(0.7), nn.Softplus(2.0, 10.0),
    ],
    ids=str,
)  # fmt: skip
def test_activations(activation: nn.Module) -> None:
    network = read(nn.Sequential(nn.Linear(6, 4), activation), ROWS)
    assert isinstance(network.nodes[1].layer, layers.Activation)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, padding=1),
        nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.AdaptiveAvgPool2d((1, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_pooling(pool: nn.Module) -> None:
    assert isinstance(read(pool, IMAGES).nodes[0].layer, layers.Pool2d)


def test_means_and_residual_blocks() -> None:
    assert read(Means((2, 3)), IMAGES).nodes[0].layer == layers.Mean((2, 3), False)
    assert read(Means((-1, -2)), IMAGES).nodes[0].layer == layers.Mean((3, 2), False)
    assert kinds(Block(), IMAGES) == ["Conv2d", "Conv2d", "Add", "relu"]
    assert read(Block(), IMAGES).nodes[2].inputs == (0, 1)


def test_batch_norm_by_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    training = read(model, ROWS)
    evaluating = read(model.eval(), ROWS)
    assert training.nodes[1].layer.batch_statistics
    assert not training.examples_independent()
    assert not evaluating.nodes[1].layer.batch_statistics
    assert evaluating.examples_independent()
    assert model[1].num_batches_tracked == 0


def test_dropout_by_mode_and_identity() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(), nn.Identity())
    assert kinds(model.eval(), ROWS) == ["Linear"]
    assert kinds(model.train(), ROWS) == ["Linear", "Dropout"]
    model[1] = nn.AlphaDropout()
    with pytest.raises(Unreadable, match=r"layer '1' .dropout. is in train"):
        read(model, ROWS)


def test_an_identity_is_the_activation_in_front_of_it() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.skip = nn.Linear(6, 4), nn.Linear(4, 4), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.skip(h) + self.second(h)

    assert kinds(Shortcut(), ROWS) == ["Linear", "relu", "Linear", "Add"]


def test_a_subclass_is_read_by_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.weight, self.bias))

    assert kinds(nn.Sequential(Doubled(6, 4)), ROWS) == ["Linear", "relu"]


def test_tied_weights_have_one_name() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    assert [node.layer.weight for node in read(model, ROWS).nodes] == ["0.weight", "0.weight"]


class Baked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 128)


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(x), x


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else torch.relu(x)


class Lies(nn.Module):
    """Python state decides what is computed: a trace sees one side of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(x) if self.calls % 2 else torch.tanh(x)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.weight))


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("model", "example", "why"),
    [
        (Baked(), IMAGES, "bakes a number of examples"),
        (Reads(), ROWS, "calls the method 'cumsum', which the kernels do not know"),
        (Tuple(), ROWS, "its output is not one tensor"),
        (Branches(), ROWS, "torch.fx can't trace its forward"),
        (Computed(), ROWS, "something that is no layer's output|computed, not a parameter"),
        (nn.Sequential(nn.Softmax(-1)), ROWS, "layer '0' .Softmax."),
        (nn.Flatten(0), ROWS, "flattens examples together"),
        (Means((0,)), ROWS, "mean over examples"),
        (Means((-2,)), ROWS, "mean over examples"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, 1, 1, padding_mode="reflect")), IMAGES, "'reflect'"),
        (nn.Sequential(nn.LSTM(6, 3)), ROWS, "layer '0' .LSTM."),
        (_hooked(), ROWS, "layer '0' has hooks"),
        (_patched(), ROWS, "forward of its own on the instance"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)), ROWS, "is parametrized"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_read_says_why(model: nn.Module, example: Tensor, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read(model, example)


def test_a_trace_that_lies_is_caught() -> None:
    model = Lies()
    model.calls = 1  # the trace, on a copy, takes tanh; the module's next call takes relu too
    read_ok = 0
    for calls in (0, 1):
        model.calls = calls
        try:
            network = read(model, ROWS)
        except Unreadable:
            continue
        read_ok += 1
        model.calls = calls
        assert torch.equal(network.forward({}, ROWS), model(ROWS))
    assert read_ok == 2  # here the copy and the module agree call by call

    class Alternating(Lies):
        def __deepcopy__(self, memo):
            twin = Alternating()
            twin.calls = self.calls + 1
            return twin

    with pytest.raises(Unreadable, match="another output than the module"):
        read(Alternating(), ROWS)


def test_networks_are_plain_data() -> None:
    network = read(Functional(), IMAGES)
    assert pickle.loads(pickle.dumps(network)) == network
    assert copy.deepcopy(network) == network
