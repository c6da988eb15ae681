"""Changes to torch's own layers: their options, their places, their hooks and classes."""

from __future__ import annotations

import gc
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from changing.kinds import Change, change, put, put_item
from changing.world import WIDTH, World

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Tanh)


def _sizes(name: str, value: int) -> None:
    """Registers the ways to set a size of the first convolution; a sum bars others from it."""

    def conv(world: World) -> Any:
        return next(m for m in world.model.modules() if isinstance(m, nn.Conv2d))

    def again(world: World) -> Change:
        # The new tuple takes the old one's place in memory.
        module = conv(world)

        def renewed(sizes: list[int]) -> None:
            freed = id(getattr(module, name))
            setattr(module, name, None)
            gc.collect(1)  # young cycles, such as a traced graph's, may hold it still
            made = [tuple(sizes)]
            while id(made[-1]) != freed and len(made) < 10_000:
                made.append(tuple(sizes))
            setattr(module, name, made[-1])

        before = getattr(module, name)
        before = [before] * 2 if isinstance(before, int) else [*before]
        renewed([value, value])
        yield
        renewed(before)

    for form in (tuple, list):
        change("images", name=f"{name}: a {form.__name__}")(
            lambda world, form=form: put(conv(world), name, form([value, value]))
        )
    change("images", name=f"{name}: a number")(lambda world: put(conv(world), name, value))
    change("images", name=f"{name}: a tuple where another was freed")(again)


_sizes("dilation", 2)
_sizes("stride", 2)
_sizes("padding", 2)


def option(name: str, part: str, kind: type[nn.Module], key: str, value: Any, **known: Any) -> None:
    """Registers the kind that sets one attribute of a layer."""
    change(part, name=name, **known)(lambda world: put(world.one(kind), key, value))


option("slope", "LeakyReLU", nn.LeakyReLU, "negative_slope", 0.4)
option("alpha", "ELU", nn.ELU, "alpha", 0.5)
option("beta", "Softplus", nn.Softplus, "beta", 2.0)
option("threshold", "Softplus", nn.Softplus, "threshold", 0.1)
option("in place", "ReLU", nn.ReLU, "inplace", True, matters=False)
option("eps of batch norm", "BatchNorm", nn.modules.batchnorm._BatchNorm, "eps", 0.5)
option("eps of group norm", "GroupNorm", nn.GroupNorm, "eps", 0.5)
# Not 4, of one number each on a vector: rounding alone would decide the ReLU behind them.
option("groups of group norm", "GroupNorm", nn.GroupNorm, "num_groups", 1)
option("p of dropout", "Dropout", nn.Dropout, "p", 1.0)
option("training of one layer", "BatchNorm", nn.modules.batchnorm._BatchNorm, "training", False)


@change("images")
def padding_mode(world: World) -> Change:
    conv = world.one(nn.Conv2d)
    both = (
        put(conv, "padding_mode", "circular"),
        put(conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    )
    for part in both:
        next(part)
    yield
    for part in both:
        next(part, None)


@change("images")
def pooling_window(world: World) -> Change:
    pools = [m for m in world.model.modules() if isinstance(m, nn.MaxPool2d)]
    both = [put(pool, key, (3, 3)) for pool in pools for key in ("kernel_size", "stride")]
    for part in both:
        next(part)
    yield
    for part in both:
        next(part, None)


@change("ListConv")
def size_in_a_list(world: World) -> Change:
    convs = [m for m in world.model.modules() if isinstance(m, nn.Conv2d)]
    listed = [m.padding for m in convs if isinstance(m.padding, list)]
    if listed:
        yield from put_item(listed[0], 0, 0)


@change()
def activation_replaced(world: World) -> Change:
    place = world.random.choice(
        [
            (parent, name)
            for parent in world.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, (*ACTIVATIONS, nn.Identity)) or "By" in type(child).__name__
        ]
    )
    yield from put(*place, nn.Tanh())


@change()
def layer_replaced(world: World) -> Change:
    model, place = world.model, len(world.model) - 1
    last = model[place]
    model[place] = type(last)(last.in_features, 3).to(last.weight.dtype)
    yield
    model[place] = last


@change()
def layer_put_in(world: World) -> Change:
    layers = world.model
    dtype = next(layers.parameters()).dtype
    layers.append(nn.Linear(3, 3).to(dtype))
    added = layers[-1]
    yield
    if layers[-1] is added:
        del layers[-1]


@change("vector", "LeakyReLU")
def order_of_layers(world: World) -> Change:
    def turned() -> None:
        layers: Any = world.model
        layers[1], layers[3] = layers[3], layers[1]

    turned()
    yield
    turned()


@change("vector")
def linear_of_another_width(world: World) -> Change:
    layers: Any = world.model
    before = layers[-1]
    wide = nn.Sequential(nn.Linear(WIDTH, 7), nn.ReLU(), nn.Linear(7, 3))
    layers[-1] = wide.to(next(layers.parameters()).dtype)
    yield
    layers[-1] = before


def _doubled(module: nn.Module, x: Any, y: Any) -> Any:
    return 2 * y


@change()
def forward_hook(world: World) -> Change:
    handle = world.one(nn.Module).register_forward_hook(_doubled)
    yield
    handle.remove()


@change()
def forward_hook_exchanged(world: World) -> Change:
    module = world.one(nn.Linear)
    module.register_forward_hook(_doubled).remove()
    handle = module.register_forward_hook(lambda m, x, y: 3 * y)
    yield
    handle.remove()


@change()
def forward_pre_hook(world: World) -> Change:
    handle = world.one(nn.Linear).register_forward_pre_hook(lambda m, x: (2 * x[0],))
    yield
    handle.remove()


@change()
def forward_of_the_instance(world: World) -> Change:
    def bent(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(type(self).forward(self, x))

    module: Any = world.one(*ACTIVATIONS, nn.Linear)
    module.forward = types.MethodType(bent, module)
    yield
    vars(module).pop("forward", None)


@change("ReLU")
def class_of_the_instance(world: World) -> Change:
    yield from put(world.one(nn.ReLU), "__class__", nn.Tanh)


class Doubled(nn.Linear):
    """A linear layer with another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


@change()
def class_of_a_linear_layer(world: World) -> Change:
    yield from put(world.one(nn.Linear), "__class__", Doubled)
