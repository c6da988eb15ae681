"""The fused executor: the whole meta-step of an MLP in one call of C++, one task a SIMD lane."""

from __future__ import annotations

import functools
import importlib
import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.problem import Outcome, Problem
from fastmeta.inner_loop import SHARED
from fastmeta.plan.layers import Activation, Flatten, Linear, Network, Reshape
from fastmeta.plan.losses import Loss
from fastmeta.tasks import Examples

# In the order of csrc/network.h.
_ACTIVATIONS = (
    "identity", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "silu", "gelu",
    "gelu_tanh",
)  # fmt: skip
_LOSSES = (
    "cross_entropy", "mse_loss", "binary_cross_entropy_with_logits", "huber_loss",
    "smooth_l1_loss", "l1_loss",
)  # fmt: skip
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Dense:
    """A linear layer with what follows it."""

    weight: str
    bias: str | None
    inputs: int
    outputs: int
    activation: int = 0
    options: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Recipe:
    """A network and a loss as the kernels take them."""

    layers: tuple[Dense, ...]
    loss: int
    loss_option: float
    ignore_index: int


class Declined(Exception):
    """What the fused kernels can't serve; the message says why."""


def recipe(network: Network | None, loss: Loss | None, unreadable: str = "") -> Recipe:
    """The network in the kernels' terms; **raises** `Declined`."""
    if network is None:
        raise Declined(f"the model could not be read into layers: {unreadable}")
    if loss is None:
        raise Declined("the loss is not a standard one")
    layers: list[Dense] = []
    for i, node in enumerate(network.nodes):
        if node.inputs != (i - 1,):
            raise Declined(f"{node.name} does not follow the layer before it")
        if len(node.shape) != 1:
            raise Declined(f"{node.name} gives {list(node.shape)} an example, not a row")
        width = node.shape[0]
        if isinstance(node.layer, Linear):
            # Of Linear, FLOPs are 2 * in * out.
            inputs = node.flops // (2 * width)
            layers.append(Dense(node.layer.weight, node.layer.bias, inputs, width))
        elif isinstance(node.layer, Activation):
            if not layers or layers[-1].activation:
                raise Declined(f"{node.name} is an activation that does not follow a Linear")
            layers[-1] = _with_activation(layers[-1], node.layer)
        elif not isinstance(node.layer, (Flatten, Reshape)):
            raise Declined(f"{node.name} is a {type(node.layer).__name__}")
    if not layers or network.output != len(network.nodes) - 1:
        raise Declined("it is no chain of linear layers")
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name]
    if len(set(names)) != len(names):
        raise Declined("a parameter is used twice")
    return Recipe(tuple(layers), *_loss(loss))


def _with_activation(layer: Dense, activation: Activation) -> Dense:
    kind, options = activation.kind, dict(activation.options)
    options.pop("inplace", None)
    values = (0.0, 0.0)
    if kind == "leaky_relu":
        values = (float(options.get("negative_slope", 0.01)), 0.0)
    elif kind == "elu":
        values = (float(options.get("alpha", 1.0)), 0.0)
    elif kind == "softplus":
        values = (float(options.get("beta", 1.0)), float(options.get("threshold", 20.0)))
    elif kind == "gelu" and options.get("approximate", "none") != "none":
        kind = "gelu_tanh"
    if kind not in _ACTIVATIONS:
        raise Declined(f"{kind} is no activation of the kernels")
    if kind in ("leaky_relu", "elu") and values[0] < 0:
        raise Declined(f"{kind} has a negative slope, so its output does not tell its side")
    if kind == "softplus" and values[0] <= 0:
        raise Declined("softplus has a beta that is not positive")
    return Dense(
        layer.weight, layer.bias, layer.inputs, layer.outputs, _ACTIVATIONS.index(kind), values
    )


def _loss(loss: Loss) -> tuple[int, float, int]:
    options = loss.options
    for name in ("weight", "pos_weight"):
        if name in options:
            raise Declined(f"the loss has {name}=")
    if loss.kind == "smooth_l1_loss" and options.get("beta", 1.0) == 0:
        raise Declined("smooth_l1_loss has beta=0")
    option = options.get("label_smoothing", options.get("delta", options.get("beta")))
    default = 0.0 if loss.kind == "cross_entropy" else 1.0
    value = default if option is None else float(option)
    return _LOSSES.index(loss.kind), value, int(options.get("ignore_index", -100))


def extension() -> ModuleType | None:
    """The compiled kernels, where this installation has them."""
    try:
        module = importlib.import_module("fastmeta._C")
    except ImportError:
        return None
    # An editable install may still have the extension of an earlier checkout.
    return module if hasattr(module, "FusedStep") else None


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why this problem can't be served by the recipe's kernels; None where it can."""
    if extension() is None:
        return "the compiled extension is not there; `python -m fastmeta info` says why"
    named = dict(problem.model.module.named_parameters())
    used = [n for layer in recipe.layers for n in (layer.weight, layer.bias) if n]
    if any(name not in named for name in used):
        return "a layer's weight is a buffer"
    dtype = named[used[0]].dtype
    if dtype not in _DTYPES:
        return f"parameters are {dtype}, not float32 or float64"
    for name in used:
        if named[name].device.type != "cpu":
            return f"parameters are on {named[name].device}"
        if named[name].dtype != dtype:
            return "parameters are of different dtypes"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if problem.model.written:
        return "a forward pass writes buffers"
    if any(name not in used for name in problem.inner.adapted):
        return "a parameter adapts that no layer reads"
    if problem.task_weights.dtype != dtype:
        return "task_weights are of another dtype than the parameters"
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, recipe, dtype, problem.differentiate)
        if why is not None:
            return why
    return None


def _declines_examples(
    examples: Examples, recipe: Recipe, dtype: torch.dtype, differentiate: bool
) -> str | None:
    x, y = examples.inputs, examples.targets
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "inputs or targets are trees"
    if differentiate and (x.requires_grad or y.requires_grad):
        return "inputs or targets require grad"
    if x.dtype != dtype:
        return f"inputs are {x.dtype}, parameters {dtype}"
    if x.shape[1] == 0 or math.prod(x.shape[2:]) != recipe.layers[0].inputs:
        return "inputs are not one row an example"
    if recipe.loss == 0 and not y.is_floating_point():
        return None if y.dim() == 2 else "labels are not one an example"
    if recipe.loss == 0:
        return "targets are probabilities of classes"
    if y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if tuple(y.shape[2:]) != (recipe.layers[-1].outputs,):
        return "targets are not one row an example"
    return None


@functools.lru_cache(maxsize=256)
def _kernel(
    recipe: Recipe, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int, isa: str,
    engine: str,
) -> Any:  # fmt: skip
    module = extension()
    assert module is not None
    layers = [
        (
            layer.inputs, layer.outputs, layer.bias is not None, layer.activation,
            *layer.options, layer.weight in adapted, layer.bias in adapted,
        )
        for layer in recipe.layers
    ]  # fmt: skip
    return module.FusedStep(
        layers, recipe.loss, recipe.loss_option, recipe.ignore_index, *sizes, *flags, prox,
        is_double, tasks, isa, engine,
    )  # fmt: skip


def kernel(problem: Problem, recipe: Recipe) -> Any:
    """The kernel for this problem's sizes and options, kept from call to call."""
    inner, tasks = problem.inner, problem.tasks
    return _kernel(
        recipe,
        inner.adapted,
        (tasks.support.count, tasks.query.count if tasks.query else 0, inner.steps),
        (
            problem.differentiate,
            inner.first_order,
            _elementwise(problem),
            problem.differentiate and bool(inner.learned_rates()),
        ),
        inner.prox,
        problem.task_weights.dtype == torch.float64,
        tasks.tasks,
        os.environ.get("FASTMETA_ISA", ""),
        os.environ.get("FASTMETA_ENGINE", ""),
    )


def group(problem: Problem, recipe: Recipe) -> tuple[int, int]:
    """How many tasks the kernel takes at a time, and their storage in bytes."""
    step = kernel(problem, recipe)
    return step.tasks, step.storage_bytes


def _elementwise(problem: Problem) -> bool:
    inner = problem.inner
    if inner.shared:
        return False
    return any(
        isinstance(rate, Tensor) and rate.numel() > (rate.shape[0] if key in inner.per_step else 1)
        for key, rate in inner.rates.items()
    )


def run(problem: Problem, recipe: Recipe) -> Outcome:
    """Computes the step; `declines` must have found nothing."""
    inner, tasks, weights = problem.inner, problem.tasks, problem.task_weights
    step = kernel(problem, recipe)
    named = dict(problem.model.module.named_parameters())
    names = [n for layer in recipe.layers for n in (layer.weight, layer.bias)]
    parameters = [None if n is None else named[n].detach().contiguous() for n in names]
    rates = _rates(problem, named, names)
    support, query = _arrays(tasks.support), _arrays(tasks.query)
    count, size = tasks.tasks, tasks.query.count if tasks.query else 0
    step_losses = weights.new_zeros(inner.steps + 1, count)
    support_losses = weights.new_empty(inner.steps, count)
    outputs = weights.new_empty(count, size, recipe.layers[-1].outputs)
    gradient = weights.new_empty(step.gradients if problem.differentiate else 0)
    adapted = {
        name: weights.new_empty(count, *named[name].shape)
        for name in (inner.adapted if problem.keep_adapted else ())
    }
    task_weights = weights.contiguous()
    step.run(
        count,
        [_address(p) for p in parameters],
        [_address(adapted.get(name or "")) for name in names] if adapted else [],
        rates.data_ptr(),
        inner.step_weights,
        [problem.evaluates(k) for k in range(inner.steps + 1)],
        task_weights.data_ptr(),
        [_address(t) for t in support],
        [_address(t) for t in query],
        support_losses.data_ptr(),
        step_losses.data_ptr(),
        outputs.data_ptr(),
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    outcome = Outcome(
        step_losses, support_losses, outputs if tasks.query else None, adapted=adapted
    )
    if problem.differentiate:
        outcome.gradients = _gradients(problem, named, names, gradient)
    return outcome


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _arrays(examples: Examples | None) -> list[Tensor | None]:
    """Inputs, targets, labels and example weights."""
    if examples is None:
        return [None] * 4
    x, y, weights = examples.inputs, examples.targets, examples.weights
    floating = y.is_floating_point()
    y = y.detach().contiguous()
    return [
        x.detach().contiguous(),
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype).contiguous(),
    ]


def _rates(problem: Problem, named: dict[str, Any], names: list[str | None]) -> Tensor:
    """[K, tensors], or [K, P] if elementwise; zero where nothing adapts."""
    inner, like = problem.inner, problem.task_weights
    steps = inner.steps
    shared = inner.rates.get(SHARED)
    if isinstance(shared, float):
        return like.new_full((steps, len(names)), shared)
    adapted = set(inner.adapted)
    elementwise = _elementwise(problem)
    columns: list[Tensor] = []
    for name in names:
        if name is None and elementwise:
            continue
        width = named[name].numel() if name is not None and elementwise else 1
        if name is None or name not in adapted:
            columns.append(like.new_zeros(steps, width))
            continue
        key = SHARED if inner.shared else name
        rate = torch.as_tensor(inner.rates[key]).detach().to(like)
        shape = tuple(named[name].shape) if elementwise else ()
        if key in inner.per_step:
            rate = rate[:steps]  # the trial takes fewer steps than there are rates
        if not elementwise:
            rate = rate.reshape(steps if key in inner.per_step else ())
        columns.append(rate.expand(steps, *shape).reshape(steps, width))
    return torch.cat(columns, dim=1)


def _gradients(
    problem: Problem, named: dict[str, Any], names: list[str | None], packed: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    inner = problem.inner
    slices: dict[str, slice] = {}
    start = 0
    for name in names:
        if name is not None:
            slices[name] = slice(start, start + named[name].numel())
            start += named[name].numel()
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for name, parameter in problem.model.parameters().items():
        found = packed[slices[name]].view(parameter.shape) if name in slices else None
        pairs.append((parameter, found))
    learned = inner.learned_rates()
    if not learned:
        return pairs
    of_rates = packed[start:].view(inner.steps, -1) if inner.steps else packed.new_zeros(0, start)
    elementwise = _elementwise(problem)
    for key, rate in learned.items():
        if elementwise:
            found = of_rates[:, slices[key]].reshape(inner.steps, *named[key].shape)
        else:
            wanted = inner.adapted if key == SHARED else (key,)
            chosen = [i for i, name in enumerate(names) if name in wanted]
            found = of_rates[:, chosen].sum(1) if inner.steps else of_rates.new_zeros(0)
        if key not in inner.per_step:
            found = found.sum(0)
        elif inner.steps < rate.shape[0]:
            missing = found.new_zeros(rate.shape[0] - inner.steps, *found.shape[1:])
            found = torch.cat([found, missing])
        found = found.sum_to_size(rate.shape) if elementwise else found.reshape(rate.shape)
        pairs.append((rate, found.to(rate)))
    return pairs
