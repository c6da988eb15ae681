"""Changes to torch itself: its modes, its functions and classes, and hooks on every module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from changing.kinds import Change, change, put
from changing.world import World


def _mode(set_mode: Callable[[Any], Any], before: Any, after: Any) -> Callable[[World], Change]:
    def make(world: World) -> Change:
        world.torchs.callback(set_mode, before)
        set_mode(after)
        yield
        set_mode(before)

    return make


def _deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=True)


def _onednn(on: bool) -> None:
    torch.backends.mkldnn.enabled = on  # pyright: ignore[reportAttributeAccessIssue]


MODES = {
    "determinism": ("ByDeterminism", _mode(_deterministic, True, False)),
    "default dtype": (
        "ByDefaultDtype", _mode(torch.set_default_dtype, torch.float32, torch.float64)
    ),
    "oneDNN": ("ByBackend", _mode(_onednn, True, False)),
    "threads": ("ByThreads", _mode(torch.set_num_threads, 1, 2)),
}  # fmt: skip
for _name, (_part, _make) in MODES.items():
    change(_part, name=f"{_name}, read")(_make)
    change(name=f"{_name}, not read", matters=False)(_make)


def _without_gradients(world: World) -> Change:
    world.grad = False
    yield
    world.grad = True


change("ByGradMode", name="no_grad, read")(_without_gradients)
change(name="no_grad, not read")(_without_gradients)


def _tanh(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.tanh()


def _doubling(function: Callable[..., Any]) -> Callable[..., Any]:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return doubled


PATCHES: dict[str, tuple[tuple[str, ...], Any, str, Callable[..., Any]]] = {
    "F.relu": (("ByFunctional",), F, "relu", _tanh),
    "F.relu under nn.ReLU": (("ReLU",), F, "relu", _tanh),
    "F.leaky_relu": (("ByGlobal",), F, "leaky_relu", _tanh),
    "F.leaky_relu of a helper": (("ByHelper",), F, "leaky_relu", _tanh),
    "torch.relu": (("ByTorch",), torch, "relu", _tanh),
    "torch.relu under F.relu": (("ByFunctional",), torch, "relu", _tanh),
    "torch.relu under nn.ReLU": (("ReLU",), torch, "relu", _tanh),
    "Tensor.relu": (("ByTensorMethod",), Tensor, "relu", _tanh),
    "F.linear": (("vector",), F, "linear", _doubling(F.linear)),
    "F.conv2d": (("images",), F, "conv2d", _doubling(F.conv2d)),
    "F.max_pool2d": (("image",), F, "max_pool2d", _doubling(F.max_pool2d)),
    "F.batch_norm": (("BatchNorm",), F, "batch_norm", _doubling(F.batch_norm)),
    "F.group_norm": (("GroupNorm",), F, "group_norm", _doubling(F.group_norm)),
    "nn.ReLU.forward": (("ReLU",), nn.ReLU, "forward", lambda self, x: x.tanh()),
    "nn.Linear.forward": ((), nn.Linear, "forward", _doubling(nn.Linear.forward)),
    "nn.Conv2d._conv_forward": (
        ("images",), nn.Conv2d, "_conv_forward", _doubling(nn.Conv2d._conv_forward)
    ),
    "nn.Sequential.forward": ((), nn.Sequential, "forward", _doubling(nn.Sequential.forward)),
    "nn.Module.__call__": ((), nn.Module, "__call__", _doubling(nn.Module.__call__)),
    "nn.Module._call_impl": ((), nn.Module, "_call_impl", _doubling(nn.Module._call_impl)),
    "nn.ReLU.__call__": (("ReLU",), nn.ReLU, "__call__", lambda self, x: x.tanh()),
    "F.cross_entropy under a lambda": (
        ("lambda",), F, "cross_entropy", _doubling(F.cross_entropy)
    ),
    "F.cross_entropy under a module": (
        ("module",), F, "cross_entropy", _doubling(F.cross_entropy)
    ),
    "F.cross_entropy under a helper": (
        ("by helper",), F, "cross_entropy", _doubling(F.cross_entropy)
    ),
    "nn.CrossEntropyLoss.forward": (
        ("module",), nn.CrossEntropyLoss, "forward", _doubling(nn.CrossEntropyLoss.forward)
    ),
}  # fmt: skip
for _name, (_parts, _owner, _attribute, _value) in PATCHES.items():
    change(*_parts, name=f"{_name} replaced")(
        lambda world, place=(_owner, _attribute, _value): world.patch(*place)
    )


def _smooth(input: Tensor, inplace: bool = False) -> Tensor:
    return input.tanh()


def _smooth_forward(self: nn.Module, input: Tensor) -> Tensor:
    return input.tanh()


INSIDES: dict[str, tuple[str, Any, str, Any]] = {
    "code of F.relu": ("ByFunctional", F.relu, "__code__", _smooth.__code__),
    "code of nn.ReLU.forward": ("ReLU", nn.ReLU.forward, "__code__", _smooth_forward.__code__),
    "default of F.leaky_relu": ("ByTorchsDefault", F.leaky_relu, "__defaults__", (0.4, False)),
}
for _name, (_part, _function, _attribute, _value) in INSIDES.items():

    @change(_part, name=_name)
    def _(world: World, place: Any = (_function, _attribute, _value)) -> Change:
        function, name, value = place
        world.torchs.callback(setattr, function, name, getattr(function, name))
        yield from put(function, name, value)


class _Smooth(TorchFunctionMode):
    """Computes tanh in place of every rectifier."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.relu, F.relu, Tensor.relu):
            return torch.tanh(args[0])
        return func(*args, **(kwargs or {}))


@change("ReLU")
def torch_function_mode(world: World) -> Change:
    mode = _Smooth()
    on = [mode.__enter__()]

    def off() -> None:
        if on:
            on.pop().__exit__(None, None, None)

    world.torchs.callback(off)
    yield
    off()


def _on_every_module(register: Any, hook: Callable[..., Any]) -> Callable[[World], Change]:
    def make(world: World) -> Change:
        handle = register(hook)
        world.torchs.callback(handle.remove)
        yield
        handle.remove()

    return make


def _double_output(module: nn.Module, x: Any, y: Any) -> Any:
    return 2 * y if isinstance(module, nn.Linear) else None


def _double_loss(module: nn.Module, x: Any, y: Any) -> Any:
    return 2 * y if isinstance(module, nn.CrossEntropyLoss) else None


def _double_input(module: nn.Module, x: Any) -> Any:
    return (2 * x[0],) if isinstance(module, nn.Linear) else None


change(name="forward hook on every module")(
    _on_every_module(torch_module.register_module_forward_hook, _double_output)
)
change("module", name="forward hook on every module, of a loss")(
    _on_every_module(torch_module.register_module_forward_hook, _double_loss)
)
change(name="forward pre-hook on every module")(
    _on_every_module(torch_module.register_module_forward_pre_hook, _double_input)
)
