"""What compiled code is given to read: no freed, short, fake or absent memory."""

from __future__ import annotations

from typing import Any

import host_cuda
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastmeta
from fastmeta.executors.addresses import Addresses

pytest.importorskip("fastmeta._C", reason="the extension was not built here")

Pair = tuple[Tensor, Tensor]


def dense() -> tuple[nn.Module, Pair]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    model(torch.randn(20, 3))  # running statistics
    return model.eval(), (torch.randn(4, 5, 3), torch.randn(4, 5, 1))


def convolutional() -> tuple[nn.Module, Pair]:
    torch.manual_seed(0)
    block = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(*block, nn.Flatten(), nn.Linear(8 * 16, 1))
    model(torch.randn(20, 1, 6, 6))
    return model.eval(), (torch.randn(4, 5, 1, 6, 6), torch.randn(4, 5, 1))


FUSED = "fused-cuda-on-host" if host_cuda.ON_HOST else "fused-cpu"
NETWORKS = {FUSED: dense, "layered-cpu": convolutional}


def step(model: nn.Module, support: Pair, query: Pair, **options: Any) -> fastmeta.MetaStep:
    options = {"inner_lr": 0.01, "inner_steps": 2, "loss_fn": F.mse_loss, **options}
    return fastmeta.maml_step(model, support, query, **options)


@pytest.mark.parametrize("executor", ["auto", "generic"])
def test_nothing_of_a_fake_mode_is_kept(executor: str) -> None:
    model, data = dense()
    expected = step(model, data, data, executor=executor)
    model, data = dense()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        step(model, data, data, executor=executor)
    found = step(model, data, data, executor=executor)
    assert type(found.loss) is Tensor
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.running_var"])
def test_freed_memory_is_named(network: str, name: str) -> None:
    model, data = NETWORKS[network]()
    assert step(model, data, data).executor == network
    tensor = model.state_dict(keep_vars=True)[name]
    size = tensor.untyped_storage().nbytes()
    before = tensor.clone()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"^{name}: its storage holds 0 bytes"):
        step(model, data, data)
    tensor.untyped_storage().resize_(size)
    with torch.no_grad():
        tensor.copy_(before)
    found = step(model, data, data)
    model, data = NETWORKS[network]()
    assert torch.equal(found.loss, step(model, data, data).loss)


def test_parameters_that_share_freed_memory_are_named() -> None:
    """As FSDP's do: views of one flat tensor, whose addresses are not zero when it is freed."""
    model, data = dense()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    expected = step(dense()[0], data, data)
    assert torch.equal(step(model, data, data).loss, expected.loss)
    flat.untyped_storage().resize_(model[0].weight.nbytes)
    with pytest.raises(RuntimeError, match=r"^0\.bias: its storage holds 96 bytes"):
        step(model, data, data)


def zero(*shape: int) -> Tensor:
    return torch._efficientzerotensor(shape)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "where", ["support_x", "support_y", "query_x", "query_y", "task_weights", "inner_lr", "bias"]
)
def test_zero_tensors_are_zeros(network: str, where: str) -> None:
    def found(make: Any) -> fastmeta.MetaStep:
        model, (x, y) = NETWORKS[network]()
        data = {"support_x": x, "support_y": y, "query_x": x, "query_y": y}
        options: dict[str, Any] = {}
        if where in data:
            data[where] = make(*data[where].shape)
        elif where == "bias":
            model[0].bias = nn.Parameter(make(8))
        else:
            options[where] = make(*((4,) if where == "task_weights" else ()))
        out = step(
            model, (data["support_x"], data["support_y"]), (data["query_x"], data["query_y"]),
            **options,
        )  # fmt: skip
        assert out.executor == network
        return out

    one, other = found(zero), found(lambda *shape: torch.zeros(shape))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.query_outputs, other.query_outputs)


def test_an_address_is_that_of_the_elements_in_order() -> None:
    at, base = Addresses(), torch.arange(12.0).view(3, 4)
    assert at.each([base, None, base[1:]], ["a", None, "b"]) == [
        base.data_ptr(), 0, base.data_ptr() + 16,
    ]  # fmt: skip
    negative = torch._neg_view(base)
    for tensor in (base.T, base[:, :2], negative, torch.zeros(1).expand(5)):
        assert at.of(tensor, "c") not in (0, base.data_ptr())
        assert torch.equal(at._kept[-1], tensor)


def test_memory_too_short_for_shape_and_strides_is_named() -> None:
    for view in (slice(None), slice(2, None)):
        base = torch.zeros(6, 4)
        for tensor in (base[view], base[view].T, base[view, ::2]):
            base.untyped_storage().resize_(base.nbytes)
            Addresses().of(tensor, "w")
            base.untyped_storage().resize_(base.nbytes - 8)
            with pytest.raises(RuntimeError, match=r"^w: its storage holds 88 bytes"):
                Addresses().of(tensor, "w")


class Watching(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


def test_a_subclass_is_named() -> None:
    with pytest.raises(TypeError, match=r"^w: a Watching, whose memory"):
        Addresses().of(torch.zeros(3).as_subclass(Watching), "w")
