"""Changes to parameters and buffers, and to the mode that says which statistics count."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from changing.kinds import Change, change
from changing.world import World


def _evaluated(world: World) -> Change:
    world.model.eval()
    yield
    world.model.train()


change("BatchNorm", name="mode, read by batch norm")(_evaluated)
change("ByTraining", name="mode, read by a forward")(_evaluated)
change(name="mode, not read", matters=False)(_evaluated)


@change("BatchNorm")
def statistics_of_another_kind(world: World) -> Change:
    norm = world.one(nn.modules.batchnorm._BatchNorm)
    norm.eval()
    before = norm.running_mean, norm.running_var
    norm.running_mean = norm.running_var = None
    with torch.no_grad():
        norm.bias.add_(0.5)
    yield
    norm.running_mean, norm.running_var = before
    norm.train()
    with torch.no_grad():
        norm.bias.sub_(0.5)


def _evaluating(world: World, key: str, fresh: bool) -> Change:
    norm = world.one(nn.modules.batchnorm._BatchNorm)
    training = norm.training
    norm.eval()
    before = getattr(norm, key)
    if before is None:
        yield
    elif fresh:
        setattr(norm, key, before + 1)
        yield
        setattr(norm, key, before)
    else:
        before.add_(1)
        yield
        before.sub_(1)
    norm.train(training)


for _key in ("running_mean", "running_var"):
    change("BatchNorm", name=f"{_key} in place")(lambda w, k=_key: _evaluating(w, k, False))
    change("BatchNorm", name=f"{_key} bound anew")(lambda w, k=_key: _evaluating(w, k, True))


@change()
def parameter_replaced(world: World) -> Change:
    layer = world.one(nn.Linear, nn.Conv2d)
    before = layer.bias
    layer.bias = None if before is None else nn.Parameter(before.detach() + 0.5)
    yield
    layer.bias = before


@change()
def bias_removed(world: World) -> Change:
    layer = world.one(nn.Linear)
    before, layer.bias = layer.bias, None
    yield
    layer.bias = before


@change()
def parameter_in_place(world: World) -> Change:
    parameter = world.random.choice([*world.model.parameters()])
    with torch.no_grad():
        parameter.add_(0.25)
    yield
    with torch.no_grad():
        parameter.sub_(0.25)


@change()
def data_swapped(world: World) -> Change:
    parameter = world.random.choice([*world.model.parameters()])
    before = parameter.data
    parameter.data = before + 0.25
    yield
    parameter.data = before.to(parameter.dtype)


@change(matters=False)
def weights_laid_out_otherwise(world: World) -> Change:
    weights = [p for p in world.model.parameters() if p.dim() > 1]
    for weight in weights:
        weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    yield
    for weight in weights:
        weight.data = weight.data.contiguous()


@change(matters=False)
def parameters_in_one_buffer(world: World) -> Change:
    parameters = [*world.model.parameters()]
    buffer = torch.cat(
        [torch.zeros(1, dtype=parameters[0].dtype), *(p.detach().flatten() for p in parameters)]
    )
    start = 1
    for p in parameters:
        p.data = buffer[start : start + p.numel()].view(p.shape).to(p.dtype)
        start += p.numel()
    yield
    for p in parameters:
        p.data = p.data.clone()


@change()
def parameter_hook(world: World) -> Change:
    handle = world.random.choice(world.leaves()).register_hook(lambda gradient: 2 * gradient)
    yield
    handle.remove()


@change()
def frozen(world: World) -> Change:
    parameter = world.random.choice([*world.model.parameters()])
    parameter.requires_grad_(False)
    yield
    parameter.requires_grad_(True)


@change()
def biases_tied(world: World) -> Change:
    layers = [m for m in world.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    first, second, *_ = layers
    before, second.bias = second.bias, first.bias
    yield
    second.bias = before


@change()
def weight_normalised(world: World) -> Change:
    layer = world.one(nn.Linear)
    if parametrize.is_parametrized(layer):
        yield
        return
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)
    yield
    parametrize.remove_parametrizations(layer, "weight")
    with torch.no_grad():
        layer.weight.div_(1.5)


@change()
def single_precision(world: World) -> Change:
    world.model.float()
    yield
    world.model.double()
