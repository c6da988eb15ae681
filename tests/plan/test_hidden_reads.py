"""Reads that no guard can watch, of a forward or a loss: nothing is taken from a plan then."""

from __future__ import annotations

import gc
import operator
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.network.stateless import StatelessModel

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

OPTIONS: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2}
SETTINGS = {"smoothing": 0.1}


class Net(nn.Module):
    flag = True

    def __init__(self, reads: Callable[[Any], bool]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 4)
        self.register_buffer("warm", torch.tensor(True))
        self.register_buffer("count", torch.tensor(1))
        type(self).reads = staticmethod(reads)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(F.relu(hidden) if self.reads(self) else torch.tanh(hidden))


def _data(tasks: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(tasks, n, 3).double(), torch.randint(4, (tasks, n))) for n in (5, 6)]


def _agrees(model: nn.Module, data: Any, **options: Any) -> Tensor:
    out = fastmeta.maml_step(model, *data, **OPTIONS, **options)
    fastmeta.clear_cache(model)
    right = fastmeta.maml_step(model, *data, **OPTIONS, **options, executor="generic")
    torch.testing.assert_close(out.loss, right.loss, rtol=1e-10, atol=0)
    return out.loss.detach()


def _set(name: str) -> Callable[[Any], object]:
    return lambda model: setattr(model, name, False)


@pytest.mark.parametrize(
    ("reads", "change"),
    [
        (lambda model: model.warm, lambda model: model.warm.fill_(False)),
        (lambda model: model.count.item() == 1, lambda model: model.count.fill_(2)),
        (lambda model: int(model.count) == 1, lambda model: model.count.add_(1)),
        (lambda model: model.__dict__.get("own", True), _set("own")),
        (lambda model: model.__class__.__dict__["flag"], lambda model: setattr(Net, "flag", False)),
        (lambda model: operator.attrgetter("flag")(model), _set("flag")),
        (lambda model: object.__getattribute__(model, "flag"), _set("flag")),
        (
            lambda model: not model._forward_hooks_with_kwargs,
            lambda model: model._forward_hooks_with_kwargs.update({0: True}),
        ),
    ],
    ids=["buffer", "item", "int", "dict", "class", "attrgetter", "getattribute", "internal"],
)
def test_of_a_forward(reads: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "flag", True)
    model, data = Net(reads), _data()
    before = fastmeta.maml_step(model, *data, **OPTIONS)
    change(model)
    after = fastmeta.maml_step(model, *data, **OPTIONS)
    fastmeta.clear_cache(model)
    right = fastmeta.maml_step(model, *data, **OPTIONS, executor="generic")
    assert abs(float((before.loss - right.loss).detach())) > 1e-6
    torch.testing.assert_close(after.loss, right.loss, rtol=1e-10, atol=0)


def _rounded(smoothing: float) -> Any:
    return lambda p, t: (
        F.cross_entropy(p, t)
        if smoothing.is_integer()
        else F.cross_entropy(p, t, label_smoothing=smoothing)
    )


def test_of_a_loss() -> None:
    model, data = Net(lambda model: True), _data()
    get = SETTINGS.get
    loss = lambda p, t: F.cross_entropy(p, t, label_smoothing=get("smoothing"))  # noqa: E731
    first = _agrees(model, data, loss_fn=loss)
    SETTINGS["smoothing"] = 0.5
    assert abs(float(_agrees(model, data, loss_fn=loss) - first)) > 1e-6
    drawn = lambda p, t: F.cross_entropy(p, t, label_smoothing=0.5 * random.random())  # noqa: E731
    of_torch = lambda p, t: F.cross_entropy(p, t, label_smoothing=torch.rand(()).item())  # noqa: E731
    for each in (drawn, of_torch):
        losses = {
            float(fastmeta.maml_step(model, *data, loss_fn=each).loss.detach()) for _ in "123"
        }
        assert len(losses) == 3
    _agrees(model, data, loss_fn=_rounded(0.3))
    _agrees(model, data, loss_fn=_rounded(1.0))


def test_late_binding_by_a_default_is_recognised() -> None:
    model, data = Net(lambda model: True), _data()
    for smoothing in (0.1, 0.3):
        loss = lambda p, t, s=smoothing: F.cross_entropy(p, t, label_smoothing=s)  # noqa: E731
        assert fastmeta.maml_step(model, *data, loss_fn=loss).executor == "fused-cpu"
        _agrees(model, data, loss_fn=loss)


def test_a_loss_does_not_keep_what_it_captures() -> None:
    model, data, kept = Net(lambda model: True), _data(), list[Any]()
    for epoch in range(3):
        prior = nn.Linear(4, 1).double()(torch.randn(9, 4).double()).mean()
        kept.append(weakref.ref(prior))
        out = fastmeta.maml_step(
            model, *data, loss_fn=lambda p, t, a=prior, e=epoch: F.cross_entropy(p, t) + a * 0.9**e
        )
        out.loss.backward()
        del out, prior
    fastmeta.clear_cache()
    gc.collect()
    assert [each() for each in kept] == [None] * 3


def test_models_that_share_a_module_step_in_two_threads() -> None:
    back = nn.Sequential(nn.Linear(3, 8), nn.Softsign()).double()
    models = [nn.Sequential(back, nn.Linear(8, 4).double()) for _ in range(2)]
    data, parameters = _data(), list(back.parameters())
    right = [fastmeta.maml_step(model, *data, **OPTIONS).loss.detach() for model in models]
    found: list[list[Tensor]] = [[], []]

    def train(i: int) -> None:
        for _ in range(30):
            found[i].append(fastmeta.maml_step(models[i], *data, **OPTIONS).loss.detach())

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for losses, expected in zip(found, right, strict=True):
        assert len(losses) == 30
        for loss in losses:
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert all(a is b for a, b in zip(back.parameters(), parameters, strict=True))


def test_an_interrupt_leaves_the_module_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, put_back, calls = nn.Linear(3, 2), StatelessModel._put_back, list[int]()

    def interrupted(self: StatelessModel, before: list[Tensor]) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        put_back(self, before)

    monkeypatch.setattr(StatelessModel, "_put_back", interrupted)
    weight = model.weight
    with pytest.raises(KeyboardInterrupt):
        StatelessModel(model)({"weight": torch.zeros(2, 3)}, torch.ones(1, 3), {})
    assert model.weight is weight


class Energy(nn.Module):
    """A forward that differentiates by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_a_forward_may_differentiate() -> None:
    data = [(torch.randn(2, n, 3).double(), torch.randn(2, n, 3).double()) for n in (4, 5)]
    assert torch.isfinite(_agrees(Energy(), data, loss_fn=F.mse_loss))
