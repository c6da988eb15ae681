"""What torch puts around a tensor: dispatch modes, subclasses, dual numbers, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fastmeta

COMPILED = {"mlp": "fused-cpu", "conv": "layered-cpu"}


def network(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 5))
    if kind == "mlp":
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (
            torch.randn(2, 5, 4),
            labels,
        )
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return model, (torch.randn(2, 5, 1, 6, 6), labels)


class Wrapped(Tensor):
    """A tensor whose numbers lie in another."""

    inside: Tensor

    @staticmethod
    def __new__(cls: type[Any], inside: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map_only(Wrapped, lambda leaf: leaf.inside, (args, kwargs or {}))
        found = tree_map_only(Tensor, Wrapped, func(*given[0], **given[1]))
        return return_and_correct_aliasing(func, args, kwargs or {}, found)


class Doubled(Tensor):
    """A tensor that doubles what linear layers and convolutions make of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found if func in (F.linear, F.conv2d) else found


@pytest.mark.parametrize("kind", COMPILED)
def test_a_dispatch_mode_sees_every_operator(kind: str) -> None:
    model, data = network(kind)
    assert fastmeta.maml_step(model, data, data).executor == COMPILED[kind]
    with FlopCounterMode(display=False) as counter:
        assert fastmeta.maml_step(model, data, data).executor == "generic"
    assert counter.get_total_flops() > 0
    assert fastmeta.maml_step(model, data, data).executor == COMPILED[kind]


@pytest.mark.parametrize("kind", COMPILED)
def test_a_mode_that_is_there_at_the_first_call(kind: str) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    model, data = network(kind)
    with Mode():
        assert fastmeta.maml_step(model, data, data).executor == "generic"
    assert fastmeta.maml_step(model, data, data).executor == COMPILED[kind]


@pytest.mark.parametrize("kind", COMPILED)
def test_a_function_mode_acts_at_the_next_call(kind: str) -> None:
    class Doubled(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            return 2 * found if func is nn.functional.linear else found

    model, data = network(kind)
    plain = fastmeta.maml_step(model, data, data, inner_steps=0)
    with torch.device("cpu"):
        assert fastmeta.maml_step(model, data, data, inner_steps=0).executor == COMPILED[kind]
    with Doubled():
        expected = nn.functional.cross_entropy(model(data[0][0]), data[1][0])
        out = fastmeta.maml_step(model, data, data, inner_steps=0)
    torch.testing.assert_close(out.task_losses[0], expected.detach())
    assert not torch.allclose(out.loss, plain.loss)


@pytest.mark.parametrize("kind", COMPILED)
def test_a_subclass_with_numbers_elsewhere(kind: str) -> None:
    model, (x, y) = network(kind)
    plain = fastmeta.maml_step(model, (x, y), (x, y))
    wrapped = Wrapped(x), y
    text = str(fastmeta.explain(model, wrapped, wrapped))
    assert "a tensor is a Wrapped" in text
    out = fastmeta.maml_step(model, wrapped, wrapped)
    assert out.executor == "generic"
    loss = out.loss.inside if isinstance(out.loss, Wrapped) else out.loss
    torch.testing.assert_close(loss, plain.loss)


@pytest.mark.parametrize("kind", COMPILED)
def test_a_subclass_with_operators_of_its_own(kind: str) -> None:
    model, (x, y) = network(kind)
    doubled = x.as_subclass(Doubled)
    assert fastmeta.maml_step(model, (x, y), (x, y)).executor == COMPILED[kind]
    out = fastmeta.maml_step(model, (doubled, y), (doubled, y), inner_steps=0)
    assert out.executor == "generic"
    expected = torch.stack([
        F.cross_entropy(model(inputs).as_subclass(Tensor), labels)
        for inputs, labels in zip(doubled, y, strict=True)
    ]).mean()  # fmt: skip
    assert torch.allclose(out.loss.detach().as_subclass(Tensor), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_a_forward_mode_tangent_is_refused() -> None:
    model, (x, y) = network("mlp")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="support: carries a forward-mode tangent"):
            fastmeta.maml_step(model, (dual, y), (x, y))
        with pytest.raises(ValueError, match="query: carries a forward-mode tangent"):
            fastmeta.maml_step(model, (x, y), (dual, y))
        fastmeta.maml_step(model, (x, y), (x, y))


@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_a_transform_is_refused(executor: str) -> None:
    model, (x, y) = network("mlp")

    def loss(x: Tensor) -> Tensor:
        return fastmeta.maml_step(model, (x, y), (x, y), executor=executor).loss

    with pytest.raises(RuntimeError, match="model: stepped inside a transform"):
        torch.func.grad(loss)(x)
    with pytest.raises(RuntimeError, match="model: stepped inside a transform"):
        torch.func.vmap(loss)(x[None])


@pytest.mark.parametrize("executor", ["auto", "generic"])
@pytest.mark.parametrize("kind", COMPILED)
def test_another_default_device_changes_nothing(kind: str, executor: str) -> None:
    _, (x, y) = network(kind)
    ragged = [(x[0], y[0]), (x[1, :3], y[1, :3])]
    rates = torch.tensor([0.1, 0.2], requires_grad=True)
    for data in ((x, y), ragged):
        options: dict[str, Any] = {
            "inner_lr": rates, "inner_steps": 2, "step_weights": [0.1, 0.2, rates.detach()[0]],
            "task_weights": [0.3, 0.7], "executor": executor,
        }  # fmt: skip
        expected = fastmeta.maml_step(network(kind)[0], data, data, **options)
        model = network(kind)[0]
        with torch.device("meta"):  # nothing computes there
            out = fastmeta.maml_step(model, data, data, **options)
            out.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        assert out.executor == expected.executor
