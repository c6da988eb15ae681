"""Inner optimizers at the public face: `MAML`, `adapt`, `explain`, copies, and what is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from fastmeta.inner import SGD, Adam, AdamW, InnerOptimizer, RMSprop


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _data(tasks: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, 5, 3), torch.randint(2, (tasks, 5))


class Gated(InnerOptimizer, nn.Module):
    """A learned optimizer: each coordinate's step by an LSTM cell of all coordinates."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(1, hidden), nn.Linear(hidden, 1)
        self.hidden = hidden

    def init(self, parameters: dict[str, Tensor]) -> Any:
        return {
            name: tuple(p.new_zeros(*p.shape, self.hidden) for _ in range(2))
            for name, p in parameters.items()
        }

    def update(
        self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
    ) -> tuple[Any, Any]:
        moved, states = {}, {}
        for name, p in parameters.items():
            h, c = (part.flatten(0, -2) for part in state[name])
            h, c = self.cell(gradients[name].reshape(-1, 1), (h, c))
            moved[name] = p - rates[name] * self.out(h).view(p.shape)
            states[name] = tuple(part.view(*p.shape, self.hidden) for part in (h, c))
        return moved, states


@pytest.mark.parametrize("kind", ["momentum", "betas"])
def test_parameters_among_the_options_are_registered_and_learned(kind: str) -> None:
    number = nn.Parameter(torch.tensor(0.8))
    rule = SGD(momentum=number) if kind == "momentum" else Adam(betas=(number, 0.99))
    maml = fastmeta.MAML(_model(), inner_optimizer=rule, inner_steps=3)
    assert any(p is number for p in maml.parameters())
    data = _data()
    maml(data, data).loss.backward()
    assert number.grad is not None
    assert float(number.grad.abs()) > 0
    twin = copy.deepcopy(maml)
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        other.zero_grad()
        other(data, data).loss.backward()
        (own,) = other.inner_options.values()
        assert own is not number
        torch.testing.assert_close(own.grad, number.grad)


@pytest.mark.parametrize("betas", [False, True])
def test_registered_options_may_be_replaced(betas: bool) -> None:
    def maml(number: float) -> fastmeta.MAML:
        option = nn.Parameter(torch.tensor(number))
        rule = Adam(betas=(0.5, option)) if betas else SGD(momentum=option)
        return fastmeta.MAML(copy.deepcopy(model), inner_optimizer=rule, inner_steps=3)

    model, data = _model(), _data()
    saved, assigned = maml(0.9), maml(0.1)
    (name,) = (name for name, _ in saved.named_parameters() if name.startswith("inner_options"))
    assigned.load_state_dict(saved.state_dict(), assign=True)
    out, again = saved(data, data), assigned(data, data)
    torch.testing.assert_close(again.loss, out.loss)
    again.loss.backward()
    assert assigned.get_parameter(name).grad is not None
    swapped = functional_call(saved, {name: torch.tensor(0.1)}, (data, data))
    torch.testing.assert_close(swapped.loss, maml(0.1)(data, data).loss)
    torch.testing.assert_close(
        assigned.adapt(data).support_losses, saved.adapt(data).support_losses
    )


def test_a_learned_optimizer_of_ones_own_learns() -> None:
    maml = fastmeta.MAML(
        nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)),
        inner_optimizer=Gated(), inner_steps=3, inner_lr=0.1, loss_fn=F.mse_loss,
    )  # fmt: skip
    optimizer = torch.optim.Adam(maml.parameters(), lr=5e-3)

    def loss() -> Tensor:
        phase = 3 * torch.rand(6, 1, 1)
        x = 4 * torch.rand(6, 10, 1) - 2
        y = torch.sin(2 * x + phase)
        return maml((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])).loss

    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.parametrize(
    "rule", [SGD(momentum=0.9), Adam(), AdamW(), RMSprop()], ids=["sgd", "adam", "adamw", "rmsprop"]
)
def test_adapting_is_what_torch_does(rule: Any) -> None:
    model, (x, y) = _model().double(), _data()
    x = x.double()
    tasks = fastmeta.adapt(model, (x, y), inner_optimizer=rule, inner_lr=0.01, inner_steps=6)
    options = {"momentum": 0.9} if rule.kind == "sgd" else {}
    make = {SGD: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW,
            RMSprop: torch.optim.RMSprop}[type(rule)]  # fmt: skip
    for task in range(len(x)):
        twin = copy.deepcopy(model)
        optimizer = make(twin.parameters(), lr=0.01, **options)
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(twin(x[task]), y[task]).backward()
            optimizer.step()
        for name, p in twin.named_parameters():
            torch.testing.assert_close(tasks.parameters[name][task], p.detach())


def test_a_parameter_that_nothing_reads_still_decays() -> None:
    class WithAuxiliaryHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.unread = _model(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

    model = WithAuxiliaryHead()
    tasks = fastmeta.adapt(model, _data(), inner_optimizer=AdamW(), inner_lr=0.1, inner_steps=2)
    expected = model.unread.weight.detach() * (1 - 0.1 * 0.01) ** 2
    torch.testing.assert_close(tasks.parameters["unread.weight"][0], expected)


def test_a_class_and_torchs_own_are_refused_by_name() -> None:
    data, model = _data(), _model()
    with pytest.raises(TypeError, match=r"inner_optimizer: the class Adam; .*write Adam\(\)"):
        fastmeta.maml_step(model, data, data, inner_optimizer=Adam)  # pyright: ignore[reportArgumentType]
    given: Any = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match="change parameters in place"):
        fastmeta.maml_step(model, data, data, inner_optimizer=given)


def _closed(factor: Tensor) -> InnerOptimizer:
    class Closed(InnerOptimizer):
        def update(
            self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
        ) -> tuple[Any, Any]:
            moved = {n: p - rates[n] * factor * gradients[n] for n, p in parameters.items()}
            return moved, state

    return Closed()


class ByKey(InnerOptimizer):
    def __init__(self, factor: Tensor) -> None:
        self.factors = {"all": factor}

    def update(
        self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
    ) -> tuple[Any, Any]:
        a = self.factors["all"]
        return {n: p - rates[n] * a * gradients[n] for n, p in parameters.items()}, state


class WithModule(InnerOptimizer):
    def __init__(self, factor: Tensor) -> None:
        self.inner = nn.Module()
        self.inner.factor = nn.Parameter(factor.detach(), factor.requires_grad)

    def update(
        self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
    ) -> tuple[Any, Any]:
        a = self.inner.factor
        return {n: p - rates[n] * a * gradients[n] for n, p in parameters.items()}, state


class AttributeOfModule(InnerOptimizer, nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def update(
        self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
    ) -> tuple[Any, Any]:
        return {n: p - rates[n] * self.factor * gradients[n] for n, p in parameters.items()}, state


@pytest.mark.parametrize("make", [_closed, ByKey, WithModule, AttributeOfModule])
@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_a_tensor_that_would_get_no_gradient_is_refused(make: Any, executor: str) -> None:
    data = _data()
    learned = (torch.tensor(0.7, requires_grad=True) * 1.0, torch.tensor(0.7, requires_grad=True))
    for factor in learned:
        with pytest.raises(ValueError, match="get no gradient"):
            fastmeta.maml_step(
                _model(), data, data, inner_optimizer=make(factor), executor=executor
            )
    rule = make(torch.tensor(0.7))
    fastmeta.maml_step(_model(), data, data, inner_optimizer=rule, executor=executor)


class Returning(InnerOptimizer):
    """Descent; what it returns is then changed."""

    def __init__(self, change: Callable[[dict[str, Tensor]], object]) -> None:
        self.change = change

    def update(
        self, gradients: Any, state: Any, parameters: Any, rates: Any, step: int
    ) -> tuple[Any, Any]:
        moved = {n: p - rates[n] * gradients[n] for n, p in parameters.items()}
        self.change(moved)
        return moved, state


@pytest.mark.parametrize("executor", ["auto", "generic"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moved: moved.pop("0.bias"), r"'0.bias' is left out, but must be \[T, 4\]"),
        (
            lambda moved: moved.update({"0.bias": moved["0.bias"].sum(0)}),
            r"'0.bias' has shape \[4\], but must be \[T, 4\]",
        ),
        (lambda moved: moved.update(other=moved["0.bias"]), "'other' has shape .* does not adapt"),
    ],
)
def test_what_an_own_rule_returns_is_checked(change: Any, message: str, executor: str) -> None:
    model, data = _model(), _data()
    with pytest.raises(ValueError, match=message):
        fastmeta.maml_step(model, data, data, inner_optimizer=Returning(change), executor=executor)


def test_support_sets_by_step_are_checked() -> None:
    (x, y), model = _data(), _model()
    steps = x[:, None].expand(-1, 3, -1, -1), y[:, None].expand(-1, 3, -1)
    out = fastmeta.maml_step(model, steps, (x, y), inner_steps=3, per_step_support=True)
    same = fastmeta.maml_step(model, (x, y), (x, y), inner_steps=3)
    torch.testing.assert_close(out.task_losses, same.task_losses)
    with pytest.raises(ValueError, match="support_x: 3 support sets a task, but inner_steps is 2"):
        fastmeta.maml_step(model, steps, (x, y), inner_steps=2, per_step_support=True)
    with pytest.raises(ValueError, match=r"support_y: shape \[4, 5\]; with per_step_support"):
        fastmeta.maml_step(model, (x, y), (x, y), inner_steps=5, per_step_support=True)


def test_another_loss_on_the_query_set_may_take_other_targets() -> None:
    (x, y), model = _data(), _model()
    query = x, torch.rand(4, 5, 2)
    out = fastmeta.maml_step(model, (x, y), query, query_loss_fn=F.mse_loss)
    assert out.loss.requires_grad
    with pytest.raises(TypeError, match="query_loss_fn: the class MSELoss"):
        fastmeta.maml_step(model, (x, y), query, query_loss_fn=nn.MSELoss)  # pyright: ignore[reportArgumentType]
