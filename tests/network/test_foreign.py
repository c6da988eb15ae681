"""Layers without own rules: each rule, and whole steps, against autograd in float64."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from strangers import CASES, CLASSES, Case, Centred, Recurrent, prelu
from torch import Tensor, nn
from torch.autograd.functional import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta
from fastmeta.network.graph import Foreign, Node
from fastmeta.network.layers import Batch, State, Wanted
from fastmeta.network.reader import Unreadable, read

CLOSE: Any = {"rtol": 1e-9, "atol": 1e-10}


def strangers(model: nn.Module, example: Tensor) -> list[Node]:
    return [node for node in read(model, example).nodes if isinstance(node.layer, Foreign)]


def values(model: nn.Module, example: Tensor, node: Node) -> list[Tensor]:
    """What the node reads in a pass over one task."""
    network, tensors = read(model, example), {**dict(model.named_parameters())}
    tensors.update(model.named_buffers())
    known = {-1: example}
    for i, each in enumerate(network.nodes):
        known[i] = each.layer.reference(tensors, *[known[j] for j in each.inputs]).detach()
    return [known[i] for i in node.inputs]


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("tasks", [3, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_four_rules(name: str, tasks: int, shared: bool) -> None:
    model = CASES[name].make().double()
    example = CASES[name].inputs(4)
    found = strangers(model, example)
    assert found
    for node in found:
        for count in {tasks, 1}:
            _check_rules(model, values(model, example, node), node.layer, tasks, shared, count)


def _check_rules(
    model: nn.Module, inputs: list[Tensor], layer: Any, tasks: int, shared: bool, count: int
) -> None:
    def like(tensor: Tensor, lead: int) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.expand(lead, *tensor.shape).clone()
        return torch.randn(lead, *tensor.shape, dtype=torch.float64)

    named = dict(model.named_parameters())
    xs = [like(x, tasks) for x in inputs]
    parameters = {n: like(named[n], 1 if shared else tasks) for n in layer.parameters()}
    buffers = {n: model.get_buffer(n)[None] for n in layer.buffers}
    rxs = [like(x, tasks) if x.is_floating_point() else None for x in inputs]
    along = {n: like(named[n], tasks) for n in parameters}

    y0 = layer.reference(
        {n: t[0] for n, t in {**parameters, **buffers}.items()}, *[x[0] for x in xs]
    )
    gy, rgy = like(y0, tasks), like(y0, tasks)
    state = State({**parameters, **buffers}, Batch(tasks, len(inputs[0])))
    wanted = Wanted(tuple(r is not None for r in rxs), dict.fromkeys(parameters, count))
    for _ in range(2):  # the second time as traced
        state.kept.clear()
        with torch.no_grad():
            y = layer.forward(state, *xs)
            back = layer.backward(state, wanted, gy)
            state.tangents = along
            ry = layer.tangent(state, *rxs)
            rback = layer.tangent_backward(state, wanted, rgy)
        for t in range(tasks):
            floats = [i for i, r in enumerate(rxs) if r is not None]

            def f(*leaves: Tensor, t: int = t, floats: Any = floats) -> Tensor:
                given = [x[t] for x in xs]
                for i, leaf in zip(floats, leaves, strict=False):
                    given[i] = leaf
                rest = dict(zip(parameters, leaves[len(floats) :], strict=True))
                return layer.reference({**{n: b[0] for n, b in buffers.items()}, **rest}, *given)

            def g(*leaves: Tensor, f: Any = f) -> tuple[Tensor, ...]:
                *at, v = leaves
                return torch.autograd.grad(f(*at), at, v, create_graph=True, materialize_grads=True)

            at = [xs[i][t] for i in floats]
            at += [p[min(t, len(p) - 1)] for p in parameters.values()]
            moving = [r[t] for r in rxs if r is not None] + [r[t] for r in along.values()]
            with sdpa_kernel(SDPBackend.MATH):
                expect_y, expect_ry = jvp(f, tuple(at), tuple(moving))
                expect, rexpect = jvp(g, (*at, gy[t]), (*moving, rgy[t]))
            torch.testing.assert_close(y[t], expect_y, **CLOSE)
            torch.testing.assert_close(ry[t], expect_ry, **CLOSE)
            for (of_inputs, of_parameters), want in ((back, expect), (rback, rexpect)):
                ours = [of_inputs[i] for i in floats]
                for k, i in enumerate(ours):
                    torch.testing.assert_close(i[t], want[k], **CLOSE)
                assert of_parameters.keys() == parameters.keys()
                if count == tasks:
                    for k, p in enumerate(of_parameters.values(), len(ours)):
                        torch.testing.assert_close(p[t], want[k], **CLOSE)
    if count < tasks:
        each = layer.tangent_backward(
            state, Wanted(wanted.inputs, dict.fromkeys(along, tasks)), rgy
        )
        for n, p in rback[1].items():
            torch.testing.assert_close(p, each[1][n].sum(0, keepdim=True), **CLOSE)


def gradients(
    model: nn.Module, data: Any, executor: str = "layered", **options: Any
) -> list[Tensor]:
    leaves = list(model.parameters())
    out = fastmeta.maml_step(model, *data, executor=executor, **options)
    assert executor == "auto" or out.executor == "layered-torch"
    found = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    return [out.loss.detach(), *(torch.zeros_like(p) if g is None else g
            for g, p in zip(found, leaves, strict=True))]  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "second-order": {},
    "prox": {"prox": 0.3},
    "first-order": {"first_order": True, "prox": 0.3},
    "low-memory": {"memory": "low"},
    "each-step": {"step_weights": [0.2, 0.3, 0.5]},
    "head": {"adapt": "last"},
    "all-but-the-first": {"adapt": "rest"},
}


@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_whole_steps(name: str, which: str) -> None:
    case, options = CASES[name], dict(OPTIONS[which])
    model = case.make().double()
    names = [n for n, _ in model.named_parameters()]
    if "adapt" in options:
        options["adapt"] = names[-2:] if options["adapt"] == "last" else names[1:]
    # Sets of a size, of which other gradients are wanted.
    data = case.data(sizes=(4, 4) if "adapt" in options else (4, 5))
    ours = gradients(model, data, inner_lr=0.1, inner_steps=2, **options)
    known = {k: v for k, v in options.items() if k in ("prox", "first_order", "step_weights")}
    theirs = oracle.maml(
        model, oracle.split(*data), list(model.parameters()), rate=lambda *_: 0.1, steps=2,
        adapted=options.get("adapt"), **known,
    )  # fmt: skip
    torch.testing.assert_close(ours[0], theirs.loss, rtol=1e-10, atol=0)
    for a, b in zip(ours[1:], theirs.gradients, strict=True):
        torch.testing.assert_close(
            a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-11
        )


def test_the_loop_serves_where_vmap_cannot() -> None:
    (node,) = strangers(model := Recurrent().double(), CASES["recurrent"].inputs(4))
    assert isinstance(node.layer, Foreign)
    state = State({n: p.detach()[None] for n, p in model.named_parameters()}, Batch(3, 4))
    with torch.no_grad():
        node.layer.forward(state, CASES["recurrent"].inputs(3, 4))
        node.layer.backward(state, Wanted((True,), {}), torch.randn(3, 4, 5).double())
    assert node.layer.runs.looped


def test_a_body_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["attention"]
    model, passes = case.make().double(), []
    original = Foreign.forward

    def forward(self: Foreign, *args: Any) -> Tensor:
        passes.append(self.kind)
        return original(self, *args)

    data = case.data()
    options: Any = {"inner_steps": 3, "adapt": "head", "executor": "layered"}
    fastmeta.maml_step(model, *data, **options)
    monkeypatch.setattr(Foreign, "forward", forward)
    fastmeta.maml_step(model, *data, **options).loss.backward()
    assert len(passes) == 2 * len(strangers(model, data[0][0][0]))  # support and query
    assert "3 layers run once" in fastmeta.explain(model, *data, **options)


class Reads(nn.Module):
    """A linear layer with something behind it."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(6, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


def kinds(model: nn.Module) -> list[str]:
    network = read(model, torch.randn(4, 6))
    return [getattr(node.layer, "kind", type(node.layer).__name__) for node in network.nodes]


def test_runs_of_functions_are_one_layer() -> None:
    assert kinds(Reads(lambda h: h.atan().asinh())) == ["Linear", "atan (and 1)"]
    assert kinds(Reads(lambda h: h.softmax(-1) + h)) == ["Linear", "softmax (and 1)"]
    assert kinds(Reads(lambda h: torch.relu(h.atan()))) == ["Linear", "atan", "relu"]

    def shared(h: Tensor) -> Tensor:
        z = h.atan()
        return torch.relu(z) + torch.tanh(z.asinh())

    found = ["Linear", "atan", "relu", "asinh", "tanh", "Add"]
    assert kinds(Reads(shared)) == found


def test_elementwise_functions_keep_examples_apart() -> None:
    x = torch.randn(4, 6)
    assert read(Reads(nn.Hardshrink()), x).examples_independent()
    assert read(Reads(lambda h: h.atan() * h), x).examples_independent()
    assert not read(Reads(Centred()), x).examples_independent()
    assert not read(Reads(nn.Softmax(-1)), x).examples_independent()  # true, but not known


class OwnLeaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def listed() -> nn.Module:
    made = nn.Hardtanh()
    made.max_val = [1.0]  # pyright: ignore[reportAttributeAccessIssue]
    return made


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.PReLU(6)), r"layer '0' \(PReLU\) is none"),
        (Reads(OwnLeaf()), "can't trace its forward"),
        (Reads(nn.AlphaDropout(0.1)), "draw no random numbers"),
        (Reads(nn.TransformerEncoderLayer(4, 2, 8, 0.1)), "draw no random numbers"),
        (Reads(lambda h: h.mul_(2)), "changes in place"),
        (Reads(lambda h: h.view(4, 2, 2).sin().view(4, 4)), "number of examples"),
        (Reads(lambda h: h * h.sum().item()), "item"),
        (Reads(lambda h: h.data.sin()), "reads data"),
        (Reads(listed()), "list"),
        (
            Reads(nn.TransformerEncoderLayer(4, 2, 8, 0.0, nn.LeakyReLU())),
            "options that are a step's arguments",
        ),
        (Reads(lambda h: (h @ h.T).sum()), "matmul|sum"),
    ],
    ids=["all-foreign", "control-flow", "dropout", "inner-dropout", "in-place", "baked", "item",
         "data", "list", "activation", "no-examples-in-front"],
)  # fmt: skip
def test_what_the_module_itself_must_run(model: nn.Module, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read(model, torch.randn(4, 6))


def test_networks_pickle_and_hold_no_data() -> None:
    case = CASES["transformer"]
    model, x = case.make().double(), case.inputs(4)
    network = read(model, x)
    saved = pickle.dumps(network)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for twin in (pickle.loads(saved), copy.deepcopy(network)):
        torch.testing.assert_close(twin.forward(tensors, x), model(x))
    (node,) = strangers(model, x)
    held = [t for op in node.layer.operations for t in op.target.module.parameters()]
    assert held
    assert all(t.is_meta for t in held)


def test_the_model_is_left_alone_and_can_go() -> None:
    case = CASES["threshold"]
    model = case.make().double()
    before = copy.deepcopy(model.state_dict())
    fastmeta.maml_step(model, *case.data(), executor="layered").loss.backward()
    assert model[2].inplace
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, CLASSES), 2.0
        self.bound, self.slope = nn.Hardtanh(-0.5, 0.5), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) * self.scale
        return self.bound(h).exp() * self.slope.negative_slope


def _shifted(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor * 0.5


def _change_scale(model: Any, _: pytest.MonkeyPatch) -> None:
    model.scale = 3.0


def _change_bound(model: Any, _: pytest.MonkeyPatch) -> None:
    model.bound.max_val = 0.1


def _change_slope(model: Any, _: pytest.MonkeyPatch) -> None:
    model.slope.negative_slope = 0.7


def _patch_function(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "hardtanh", _shifted)


def _patch_method(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "exp", _shifted)


@pytest.mark.parametrize(
    "change", [_change_scale, _change_bound, _change_slope, _patch_function, _patch_method],
    ids=["attribute", "option", "known-option", "function", "method"],
)  # fmt: skip
def test_what_torch_is_asked_anew_follows_changes(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(Scaled, (6,))
    model, data = Scaled().double(), case.data()
    first = gradients(model, data)
    change(model, monkeypatch)
    ours = gradients(model, data, "auto")
    theirs = oracle.maml(model, oracle.split(*data), list(model.parameters()))
    assert not torch.allclose(first[0], ours[0])
    torch.testing.assert_close(ours[0], theirs.loss, **CLOSE)
    for a, b in zip(ours[1:], theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_ragged_tasks_are_not_padded_where_examples_may_mix() -> None:
    case = CASES["own-module"]
    model = case.make().double()
    tasks = [case.data(1, sizes) for sizes in ((3, 5), (4, 5), (5, 4))]
    support, query = ([(x[0], y[0]) for x, y in side] for side in zip(*tasks, strict=True))
    out = fastmeta.maml_step(model, support, query, inner_lr=0.1)
    each = [oracle.split(*task)[0] for task in tasks]
    theirs = oracle.maml(model, each, list(model.parameters()), rate=lambda *_: 0.1)
    torch.testing.assert_close(out.loss, theirs.loss, **CLOSE)


def test_auto_takes_it_or_not_and_is_right() -> None:
    model = prelu().double()
    data = CASES["prelu"].data(25)
    out = fastmeta.maml_step(model, *data, inner_lr=0.1, inner_steps=2)
    assert out.executor in ("generic", "layered-torch")
    theirs = oracle.maml(
        model, oracle.split(*data), list(model.parameters()), rate=lambda *_: 0.1, steps=2
    )
    torch.testing.assert_close(out.loss, theirs.loss, **CLOSE)
