"""Next to `torch.compile`: called from a compiled function, and given compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastmeta

pytestmark = [
    # torch.compile imports parts of torch that announce their own deprecation.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # After any graph break torch looks at `.grad` of the tensors that it carries on with.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

OPTIONS = {"inner_steps": 2, "inner_lr": 0.1}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _tasks() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def examples(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(3, count, 3, dtype=torch.float64), torch.randint(2, (3, count))

    return examples(4), examples(5)


def _grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def _expected(model: nn.Module, tasks) -> tuple[Tensor, list[Tensor]]:
    twin = copy.deepcopy(model)
    out = fastmeta.maml_step(twin, *tasks, **OPTIONS)
    out.loss.backward()
    return out.loss.detach(), _grads(twin)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_inside_a_compiled_function(backend: str) -> None:
    model, tasks = _model(), _tasks()
    loss, gradients = _expected(model, tasks)

    @torch.compile(backend=backend)
    def doubled_loss(support, query) -> Tensor:
        centred = support[0] * 1.0, support[1]
        return 2 * fastmeta.maml_step(model, centred, query, **OPTIONS).loss

    got = doubled_loss(*tasks)
    got.backward()
    assert torch.equal(got.detach(), 2 * loss)
    assert all(torch.equal(a, 2 * b) for a, b in zip(_grads(model), gradients, strict=True))


def test_a_whole_training_step_inside_a_compiled_function() -> None:
    maml, tasks = fastmeta.MAML(_model(), **OPTIONS), _tasks()
    _, gradients = _expected(maml.model, tasks)

    @torch.compile(backend="eager")
    def train(support, query) -> None:
        maml(support, query).loss.backward()

    train(*tasks)
    assert all(map(torch.equal, _grads(maml.model), gradients))


def _outside(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def _in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def _a_part(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


@pytest.mark.parametrize("compiled", [_outside, _in_place, _a_part])
def test_a_compiled_model_is_unwrapped(compiled) -> None:
    model, tasks = _model(), _tasks()
    loss, gradients = _expected(model, tasks)
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    wrapped = compiled(model)
    # Compiled code by aot_autograd has no second derivative: it must not have been called.
    out = fastmeta.maml_step(wrapped, *tasks, **OPTIONS)
    out.loss.backward()
    # A part that is compiled can't be read into layers, so another executor may serve.
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-12, atol=1e-12)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, parameters, before.values()))


class Network(nn.Module):
    """`nn.Module.compile` takes no module whose forward is torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in-place"])
def test_a_compiled_model_stays_compiled(in_place: bool) -> None:
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    model, tasks = Network().double(), _tasks()
    x = tasks[0][0][0]
    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    model(x)
    assert len(runs) == 1
    fastmeta.maml_step(model, *tasks, **OPTIONS)
    runs.clear()
    model(x)
    assert len(runs) == 1


def test_maml_of_a_compiled_model_has_the_models_own_parameter_names() -> None:
    maml = fastmeta.MAML(torch.compile(_model(), backend="eager"), **OPTIONS)
    assert set(maml.state_dict()) == {"model." + name for name in _model().state_dict()}


def test_adapt_and_explain_take_a_compiled_model() -> None:
    model, (support, query) = _model(), _tasks()
    wrapped = torch.compile(model, backend="eager")
    assert fastmeta.explain(wrapped, support, query) == fastmeta.explain(model, support, query)
    got, expected = (fastmeta.adapt(m, support, **OPTIONS)(query[0]) for m in (wrapped, model))
    assert torch.equal(got, expected)
