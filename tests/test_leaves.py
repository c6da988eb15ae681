"""No gradient is dropped silently: whatever reaches the loss and requires grad gets its own."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_options import agree, data, network
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta

FORMS = ("vmap", "loop", "sweep")
RATE = {"rate": lambda name, step: 0.2, "steps": 2}
OPTIONS = {"inner_lr": 0.2, "inner_steps": 2}


@pytest.mark.parametrize("form", FORMS)
def test_inputs(form: str, force_form) -> None:
    force_form(form)
    support, query = data()
    support[0].requires_grad_()
    query[0].requires_grad_()
    agree(network(), support, query, [support[0], query[0]], RATE, **OPTIONS)


@pytest.mark.parametrize("form", FORMS)
def test_distilled_labels(form: str, force_form) -> None:
    force_form(form)
    support, query = data()
    labels = torch.rand(3, 4, 2, dtype=torch.float64).softmax(-1).requires_grad_()
    query_labels = F.one_hot(query[1], 2).double()
    agree(network(), (support[0], labels), (query[0], query_labels), [labels], RATE, **OPTIONS)


def test_an_encoder_upstream_of_the_inputs() -> None:
    encoder = nn.Linear(3, 3).double()
    model, (support, query) = network(), data()

    def encoded(tasks):
        return (torch.tanh(encoder(tasks[0])), tasks[1])

    leaves = [*model.parameters(), *encoder.parameters()]
    reference = oracle.maml(model, oracle.split(encoded(support), encoded(query)), leaves, **RATE)
    fastmeta.maml_step(model, encoded(support), encoded(query), **OPTIONS).loss.backward()
    for leaf, gradient in zip(leaves, reference.gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-11)


class LearnedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * self.temperature.exp(), target)


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_parameters_of_a_loss_module(memory: str) -> None:
    loss = LearnedLoss()
    agree(
        network(), *data(tasks=6), [loss.temperature],
        {**RATE, "loss_fn": loss}, loss_fn=loss, memory=memory, **OPTIONS,
    )  # fmt: skip
    assert loss.unused.grad is None


@pytest.mark.parametrize("memory", ["auto", "low"])
@pytest.mark.parametrize("upstream", [False, True], ids=["leaf", "computed"])
def test_a_tensor_in_a_closure(upstream: bool, memory: str) -> None:
    leaf = torch.tensor([0.7, 1.4], dtype=torch.float64, requires_grad=True)
    captured = (leaf * 2).sin() if upstream else leaf

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction * captured, target)

    agree(
        network(), *data(tasks=6), [leaf],
        {**RATE, "loss_fn": loss}, loss_fn=loss, memory=memory, **OPTIONS,
    )  # fmt: skip


def test_a_closure_made_anew_each_step_is_found_each_time() -> None:
    model, (support, query) = network(), data(tasks=30)
    for _ in range(3):
        leaf = torch.rand(2, dtype=torch.float64, requires_grad=True)
        loss = lambda p, t, leaf=leaf: F.cross_entropy(p * leaf, t)  # noqa: E731
        agree(model, support, query, [leaf], {**RATE, "loss_fn": loss}, loss_fn=loss, **OPTIONS)


class Modulated(nn.Module):
    """A model whose forward reads a tensor that is no parameter (a hypernetwork's output)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.film: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.film is not None
        return torch.tanh(self.layer(x)) * self.film


def test_a_tensor_attribute_of_the_model() -> None:
    model, hyper = Modulated(), nn.Linear(1, 2).double()
    for _ in range(2):
        model.film = hyper(torch.ones(1, dtype=torch.float64))
        agree(model, *data(tasks=5), list(hyper.parameters()), RATE, **OPTIONS)


class Switched(nn.Module):
    """Python state turns a captured tensor on after the plan was made without it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.film: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return h if self.film is None else h * self.film


@pytest.mark.parametrize("form", ["chosen", "loop", "sweep"])
def test_a_tensor_that_appears_after_planning(form: str, force_form) -> None:
    if form != "chosen":
        force_form(form)
    model, (support, query) = Switched(), data(tasks=30)
    agree(model, support, query, [], RATE, **OPTIONS)
    model.film = torch.rand(2, dtype=torch.float64, requires_grad=True)
    agree(model, support, query, [model.film], RATE, **OPTIONS)


def test_the_models_own_weight_in_a_closure() -> None:
    model = network()
    loss = lambda p, t: F.cross_entropy(p, t) + 0.1 * model[0].weight.square().sum()  # noqa: E731
    agree(model, *data(tasks=5), [], {**RATE, "loss_fn": loss}, loss_fn=loss, **OPTIONS)


class Skipping(nn.Module):
    """A parameter that is reached only once Python state says so."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.main(x))
        return h + self.extra(x) if self.skip else h


@pytest.mark.parametrize("tasks", [3, 40])
def test_a_parameter_that_is_reached_after_planning(tasks: int) -> None:
    model, (support, query) = Skipping(), data(tasks=tasks)
    agree(model, support, query, [], RATE, **OPTIONS)
    assert model.extra.weight.grad is None
    model.skip = True
    agree(model, support, query, [], RATE, **OPTIONS)
    assert model.extra.weight.grad is not None


def test_weights_given_as_a_list_of_tensors_get_their_gradients() -> None:
    model, (support, query) = network(), data()
    steps = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.3, 0.3, 0.4)]
    tasks = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.2, 0.5, 0.3)]
    reference = {**RATE, "step_weights": steps, "task_weights": torch.stack(tasks)}
    agree(
        model, support, query, [*steps, *tasks], reference,
        step_weights=steps, task_weights=tasks, **OPTIONS,
    )  # fmt: skip


def test_a_buffer_that_learns_gets_its_gradient() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2).double()
            self.register_buffer("first", torch.randn(8, 3).double().requires_grad_())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(F.linear(x, self.first)))

    torch.manual_seed(0)
    model = Buffered()
    x, y = torch.randn(2, 3, 4, 3).double(), torch.randint(2, (2, 3, 4))
    fastmeta.maml_step(model, (x[0], y[0]), (x[1], y[1]), inner_lr=0.1).loss.backward()
    total = 0.0
    for t in range(3):
        phi = dict(model.named_parameters())
        loss = F.cross_entropy(functional_call(model, phi, (x[0, t],)), y[0, t])
        gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {n: p - 0.1 * g for (n, p), g in zip(phi.items(), gradients, strict=True)}
        total += F.cross_entropy(functional_call(model, phi, (x[1, t],)), y[1, t]) / 3
    (expected,) = torch.autograd.grad(total, [model.first])
    torch.testing.assert_close(model.first.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("executor", ["fused", "layered", "generic"])
@pytest.mark.parametrize(
    ("steps", "step_weights", "reached"),
    [(0, None, False), (2, [1.0, 0.0, 0.0], False), (2, [1.0, 1.0, 0.0], True)],
)
def test_a_learning_rate_that_no_loss_reaches_gets_no_gradient(
    steps: int, step_weights: list[float] | None, reached: bool, executor: str
) -> None:
    if executor == "fused":
        pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    rate = torch.tensor(0.1, requires_grad=True)
    pairs = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    out = fastmeta.maml_step(
        nn.Linear(3, 2), pairs, pairs, inner_lr=rate, inner_steps=steps, loss_fn=F.mse_loss,
        step_weights=step_weights, executor=executor,
    )  # fmt: skip
    out.loss.backward()
    assert out.executor.startswith(executor)
    assert (rate.grad is not None) == reached
