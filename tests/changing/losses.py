"""Changes to the loss: another object, another constant, and what its Python reads."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from changing.kinds import Change, attribute, change, put, put_item
from changing.world import World


def the_loss(world: World) -> Any:
    """The loss function itself."""
    return world.loss_fn


def the_code(world: World) -> Any:
    """The globals of the user's losses."""
    return world.loss_code


def _doubled(prediction: Tensor, target: Tensor) -> Tensor:
    return 2 * F.cross_entropy(prediction, target)


def _doubled_with_default(prediction: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    return 2 * F.cross_entropy(prediction, target, label_smoothing=smoothing)


class Halved(nn.Module):
    """Another module's forward."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(prediction, target)


def _doubled_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    return 2 * F.cross_entropy(*args, **kwargs)


def _more(world: World) -> float:
    return 0.3 + 0.1 * world.random.random()


attribute("loss's global constant", "by global", the_code, "SMOOTHING", 0.4)
attribute("loss helper's global constant", "by helper", the_code, "SMOOTHING", 0.4)
attribute("loss's helper", "by helper", the_code, "smoothed", _doubled)
attribute("code of a loss's helper", "by helper", lambda w: w.loss_code.smoothed, "__code__",
          _doubled.__code__)  # fmt: skip
attribute("loss's code", "by global", the_loss, "__code__", _doubled.__code__)
attribute("lambda loss's code", "lambda", the_loss, "__code__", _doubled.__code__)
attribute("loss's default", "by default", the_loss, "__defaults__", (0.4,))
attribute("loss's code, with a default", "by default", the_loss, "__code__",
          _doubled_with_default.__code__)  # fmt: skip
attribute("loss's keyword defaults", "by keyword default", the_loss, "__kwdefaults__",
          {"smoothing": 0.4})  # fmt: skip
attribute("loss's cell", "by cell", lambda w: w.loss_fn.__closure__[0], "cell_contents", 0.4)
attribute("loss's cell of a tensor", "by weight", lambda w: w.loss_fn.__closure__[0],
          "cell_contents", torch.tensor([3.0, 1.0, 1.0]).double())  # fmt: skip
attribute("scale of the user's loss module", "own module", the_loss, "scale", 3.0)
attribute("field of a loss's object", "method", lambda w: w.loss_fn.__self__, "smoothing", 0.4)
attribute("label smoothing", "module", the_loss, "label_smoothing", 0.4)
attribute("reduction", "module", the_loss, "reduction", "sum")
attribute("ignored label", "module", the_loss, "ignore_index", 0)
attribute("class weights none", "weighted module", the_loss, "weight", None)
attribute("class of the loss module", "own module", the_loss, "__class__", Halved)
attribute("delta", "huber module", the_loss, "delta", 0.2)
attribute("reduction of a regression loss", "huber module", the_loss, "reduction", "sum")
attribute("beta of the loss", "smooth L1 module", the_loss, "beta", 0.2)
attribute("forward of the user's loss module", "own module", lambda w: w.loss_code.ScaledLoss,
          "forward", lambda self, prediction, target: _doubled(prediction, target) * 3)  # fmt: skip


@change("by keyword default")
def loss_keyword_default_in_place(world: World) -> Change:
    yield from put_item(world.loss_fn.__kwdefaults__, "smoothing", 0.4)


@change("by list")
def loss_default_list_in_place(world: World) -> Change:
    yield from put_item(world.loss_fn.__defaults__[0], 0, 0.4)


@change("partial")
def loss_partial_in_place(world: World) -> Change:
    yield from put_item(world.loss_fn.keywords, "label_smoothing", 0.4)


@change("by global")
def loss_global_module(world: World) -> Change:
    another = types.SimpleNamespace(**{**vars(F), "cross_entropy": _doubled_cross_entropy})
    yield from put(world.loss_code, "F", another)


@change("partial")
def new_partial(world: World) -> Change:
    new = functools.partial(F.cross_entropy, label_smoothing=_more(world))
    yield from put(world, "loss_fn", new)


@change("by cell")
def new_closure(world: World) -> Change:
    yield from put(world, "loss_fn", world.loss_code.loss_by_cell(_more(world)))


@change("by weight")
def new_closure_of_a_tensor(world: World) -> Change:
    weight = torch.rand(3, dtype=torch.float64) + 0.5
    yield from put(world, "loss_fn", world.loss_code.loss_by_weight(weight))


@change("weighted module")
def new_class_weights(world: World) -> Change:
    yield from put(world.loss_fn, "weight", torch.rand(3, dtype=torch.float64) + 0.5)


@change("weighted module")
def new_weighted_module(world: World) -> Change:
    new = nn.CrossEntropyLoss(weight=torch.rand(3, dtype=torch.float64) + 0.5)
    yield from put(world, "loss_fn", new)


@change("weighted module")
def class_weights_in_place(world: World) -> Change:
    weight = world.loss_fn.weight
    if weight is None:
        yield
        return
    weight[0] += 1
    yield
    weight[0] -= 1


@change("by weight")
def captured_weights_in_place(world: World) -> Change:
    weight = world.loss_fn.__closure__[0].cell_contents
    weight[0] += 1
    yield
    weight[0] -= 1


@change("module")
def hook_on_the_loss(world: World) -> Change:
    handle = world.loss_fn.register_forward_hook(lambda m, x, y: 2 * y)
    yield
    handle.remove()


@change("module")
def forward_of_the_loss_instance(world: World) -> Change:
    world.loss_fn.forward = _doubled
    yield
    vars(world.loss_fn).pop("forward", None)


@change("cross_entropy")
def another_loss(world: World) -> Change:
    yield from put(world, "loss_fn", _doubled)


@change("lambda")
def lambda_of_the_same_code(world: World) -> Change:
    def make(smoothing: float) -> Any:
        return lambda p, y: F.cross_entropy(p, y, label_smoothing=smoothing)

    yield from put(world, "loss_fn", make(_more(world)))
