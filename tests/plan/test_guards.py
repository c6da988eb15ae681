"""What a forward reads beside its input: seen when it changes, or not trusted to kernels."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.plan.guards import Guards

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

SLOPE = 0.1
act = F.relu


def helper(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


helper.on = False  # pyright: ignore[reportFunctionMemberAccess]


@dataclasses.dataclass
class Settings:
    slope: float = 0.1


class Net(nn.Module):
    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()
        self.own = 0.1
        self.settings = Settings()
        self.activation = F.relu
        self.listed = [0.1]

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


class ByGlobal(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, SLOPE)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), "SLOPE", 0.4)


class ByHelper(ByGlobal):
    def middle(self, x: Tensor) -> Tensor:
        return helper(x)


class ByGlobalFunction(Net):
    def middle(self, x: Tensor) -> Tensor:
        return act(x)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), "act", torch.tanh)


class ByClass(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Net, "slope", 0.4)


class ByInstance(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.own)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = 0.4


class ByFunctionAttribute(Net):
    def middle(self, x: Tensor) -> Tensor:
        return self.activation(x)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.activation = torch.tanh


class ByAttributeOfFunction(Net):
    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if helper.on else F.relu(x)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(helper, "on", True)


class ByMethod(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ByMethod, "middle", lambda self, x: torch.tanh(x))


class BySettings(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.settings.slope)


class ByList(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.listed[0])


class ByChance(Net):
    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x) if random.random() < 2 else x


def _data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(2, 4, 3).double(), torch.randint(2, (2, 4))) for _ in range(2)]


@pytest.mark.parametrize(
    "kind",
    [
        ByGlobal,
        ByHelper,
        ByGlobalFunction,
        ByClass,
        ByInstance,
        ByFunctionAttribute,
        ByAttributeOfFunction,
        ByMethod,
    ],
)
def test_what_changes_is_seen(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = kind(), _data()
    before = fastmeta.maml_step(model, *data)
    assert before.executor == "fused-cpu"
    model.change(monkeypatch)
    after = fastmeta.maml_step(model, *data)
    right = fastmeta.maml_step(model, *data, executor="generic")
    assert abs(before.loss - right.loss) > 1e-4
    torch.testing.assert_close(after.loss, right.loss, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [BySettings, ByList, ByChance])
def test_what_can_not_be_seen_is_not_trusted(kind: type[Net]) -> None:
    assert "may change unseen" in Guards(kind()).unseen or "module random" in Guards(kind()).unseen
    assert fastmeta.maml_step(kind(), *_data()).executor == "generic"


def test_hooks_put_on_later_are_seen() -> None:
    model, data, calls = ByInstance(), _data(), []
    fastmeta.maml_step(model, *data)
    model.second.register_full_backward_hook(lambda *_: calls.append(1))
    assert fastmeta.maml_step(model, *data).executor == "generic"
    assert calls


FLAGS = {"on": False}


class Config:
    on = False


def by_default(x: Tensor, flags: dict[str, bool] = FLAGS) -> Tensor:
    return torch.tanh(x) if flags["on"] else F.relu(x)


def by_partial(flags: dict[str, bool], x: Tensor) -> Tensor:
    return torch.tanh(x) if flags["on"] else F.relu(x)


bound = functools.partial(by_partial, FLAGS)
look = FLAGS.get


class Based(Net):
    def middle(self, x: Tensor) -> Tensor:
        return by_default(x)


class BySuper(Based):
    def middle(self, x: Tensor) -> Tensor:
        return super().middle(x)


class ByConfig(Net):
    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if Config.on else F.relu(x)


class ByPartial(Net):
    def middle(self, x: Tensor) -> Tensor:
        return bound(x)


class ByBoundBuiltin(Net):
    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if look("on") else F.relu(x)


class ByName(Net):
    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if globals()["FLAGS"]["on"] else F.relu(x)


class ByCall(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8).double(), nn.ReLU(), nn.Linear(8, 2).double())

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(-x if FLAGS["on"] else x)


@pytest.mark.parametrize(
    "kind",
    [BySuper, ByConfig, ByPartial, ByBoundBuiltin, ByName, ByCall],
)
def test_what_is_read_in_a_roundabout_way_is_not_trusted(
    kind: type[Net], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = kind(), _data()
    before = fastmeta.maml_step(model, *data)
    assert before.executor == "generic"
    monkeypatch.setitem(FLAGS, "on", True)
    monkeypatch.setattr(Config, "on", True)
    assert abs(fastmeta.maml_step(model, *data).loss - before.loss) > 1e-4


def test_a_variable_of_an_enclosing_function_is_seen() -> None:
    slope = 0.1

    class ByCell(Net):
        def middle(self, x: Tensor) -> Tensor:
            return F.leaky_relu(x, slope)

    model, data = ByCell(), _data()
    before = fastmeta.maml_step(model, *data)
    slope = 0.4
    after = fastmeta.maml_step(model, *data)
    assert before.executor == after.executor == "fused-cpu"
    assert abs(after.loss - before.loss) > 1e-4


@pytest.mark.parametrize("replaced", ["relu", "forward", "hook"])
def test_what_replaces_torchs_own_is_seen(replaced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = ByMethod(), _data()
    before = fastmeta.maml_step(model, *data)
    forward = nn.Linear.forward
    if replaced == "relu":
        monkeypatch.setattr(F, "relu", lambda x: torch.tanh(x))
    elif replaced == "forward":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    handle = None
    if replaced == "hook":
        handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: 2 * y)
    try:
        after = fastmeta.maml_step(model, *data)
        fresh = fastmeta.maml_step(ByMethod(), *data)
        right = fastmeta.maml_step(model, *data, executor="generic")
    finally:
        if handle is not None:
            handle.remove()
    assert before.executor == "fused-cpu"
    assert abs(right.loss - before.loss) > 1e-4
    for out in (after, fresh):
        torch.testing.assert_close(out.loss, right.loss, rtol=1e-10, atol=0)


def test_a_global_with_a_parts_name_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ByGlobal()
    expected = Guards(model).key()
    for name in ("first", "middle", "leaky_relu"):
        monkeypatch.setitem(globals(), name, [0.1])  # which nothing can watch
    assert not Guards(model).unseen
    assert Guards(model).key() == expected
