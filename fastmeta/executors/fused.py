"""The fused executor: the whole meta-step of an MLP in one call of C++."""

from __future__ import annotations

import functools
import importlib
import math
import os
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import BatchNorm1d

from fastmeta.executors.problem import Outcome, Problem
from fastmeta.inner_loop import SHARED
from fastmeta.plan.layers import Activation, BatchNorm, Flatten, Linear, Network, Reshape
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
_NORMS = (None, True, False)
"""By whether a norm takes the statistics of the batch."""
_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Dense:
    """A linear layer with what follows it: maybe a norm, maybe an activation."""

    weight: str
    bias: str | None
    inputs: int
    outputs: int
    norm: BatchNorm | None = None
    activation: int | None = None
    options: tuple[float, float] = (0.0, 0.0)

    def tensors(self) -> tuple[str | None, ...]:
        """The names of weight, bias, scale and shift, as the kernels order them."""
        norm = self.norm
        return (self.weight, self.bias, norm and norm.weight, norm and norm.bias)


@dataclass(frozen=True)
class Recipe:
    """A network and a loss as the kernels take them."""

    layers: tuple[Dense, ...]
    loss: int
    loss_option: float
    ignore_index: int
    weighted: bool = False
    """Whether the loss has weights."""
    weight: Tensor | None = field(default=None, compare=False)
    pos_weight: Tensor | None = field(default=None, compare=False)


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
        elif isinstance(node.layer, BatchNorm):
            if not layers or layers[-1].norm or layers[-1].activation is not None:
                raise Declined(f"{node.name} is a BatchNorm that does not follow a Linear")
            layers[-1] = replace(layers[-1], norm=node.layer)
        elif isinstance(node.layer, Activation):
            if not layers or layers[-1].activation is not None:
                raise Declined(f"{node.name} is an activation that does not follow a Linear")
            layers[-1] = _with_activation(layers[-1], node.layer)
        elif not isinstance(node.layer, (Flatten, Reshape)):
            raise Declined(f"{node.name} is a {type(node.layer).__name__}")
    if not layers or network.output != len(network.nodes) - 1:
        raise Declined("it is no chain of linear layers")
    names = [name for layer in layers for name in layer.tensors() if name]
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
    return replace(layer, activation=_ACTIVATIONS.index(kind), options=values)


def _loss(loss: Loss) -> tuple[Any, ...]:
    options = loss.options
    if loss.kind == "smooth_l1_loss" and options.get("beta", 1.0) == 0:
        raise Declined("smooth_l1_loss has beta=0")
    option = options.get("label_smoothing", options.get("delta", options.get("beta")))
    default = 0.0 if loss.kind == "cross_entropy" else 1.0
    value = default if option is None else float(option)
    weight, pos_weight = options.get("weight"), options.get("pos_weight")
    weighted = weight is not None or pos_weight is not None
    ignore = int(options.get("ignore_index", -100))
    return _LOSSES.index(loss.kind), value, ignore, weighted, weight, pos_weight


def extension() -> ModuleType | None:
    """The compiled kernels, where this installation has them."""
    try:
        module = importlib.import_module("fastmeta._C")
    except ImportError:
        return None
    # An editable install may still have the extension of an earlier checkout.
    return module if hasattr(module, "FusedStep") else None


def environment() -> tuple[str, ...]:
    """What beside its arguments a step's kernel is chosen by."""
    return tuple(os.environ.get(f"FASTMETA_{name}", "") for name in ("ISA", "ENGINE", "FORM"))


def declines(problem: Problem, recipe: Recipe) -> str | None:
    """Why this problem can't be served by the recipe's kernels; None where it can."""
    if extension() is None:
        return "the compiled extension is not there; `python -m fastmeta info` says why"
    named = dict(problem.model.module.named_parameters())
    used = [name for layer in recipe.layers for name in layer.tensors() if name]
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
    why = _declines_buffers(problem, recipe, dtype) or _declines_weights(problem, recipe, dtype)
    if why is not None:
        return why
    if any(name not in used for name in problem.inner.adapted):
        return "a parameter adapts that no layer reads"
    if problem.task_weights.dtype != dtype:
        return "task_weights are of another dtype than the parameters"
    if problem.tasks.support.weights is not None and any(
        layer.norm is not None and layer.norm.batch_statistics for layer in recipe.layers
    ):
        return "padded examples would count in the statistics of a batch norm"
    _check_batches(problem, recipe)
    for examples in problem.tasks.sets():
        why = _declines_examples(examples, recipe, dtype, problem.differentiate)
        if why is not None:
            return why
    return None


def _declines_buffers(problem: Problem, recipe: Recipe, dtype: torch.dtype) -> str | None:
    """Running statistics may be written, because every pass's are thrown away; nothing else."""
    module = problem.model.module
    written = set(problem.model.written)
    for layer in recipe.layers:
        if layer.norm is None:
            continue
        statistics = [name for name in (layer.norm.mean, layer.norm.variance) if name]
        written.difference_update(statistics)
        if layer.norm.batch_statistics:
            continue
        buffers = dict(module.named_buffers())
        for name in statistics:
            if name not in buffers or buffers[name].requires_grad:
                return "running statistics are no constant buffers"
            if buffers[name].dtype != dtype or buffers[name].device.type != "cpu":
                return f"running statistics are {buffers[name].dtype}, parameters {dtype}"
    for name in list(written):
        owner, _, counter = name.rpartition(".")
        if counter == "num_batches_tracked" and type(module.get_submodule(owner)) is BatchNorm1d:
            written.remove(name)
    return "a forward pass writes buffers" if written else None


def _check_batches(problem: Problem, recipe: Recipe) -> None:
    """One example has no variance: **raises** what torch raises."""
    normed = [n for n in recipe.layers if n.norm is not None and n.norm.batch_statistics]
    for examples in problem.tasks.sets() if normed else ():
        if examples.count == 1 and (examples is not problem.tasks.support or problem.inner.steps):
            like = problem.task_weights.new_zeros(1, normed[0].outputs)
            F.batch_norm(like, None, None, training=True)


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
    if y.dtype != dtype:
        return f"targets are {y.dtype}, parameters {dtype}"
    if tuple(y.shape[2:]) != (recipe.layers[-1].outputs,):
        return "targets are not one row an example"
    return None


def _declines_weights(problem: Problem, recipe: Recipe, dtype: torch.dtype) -> str | None:
    outputs = recipe.layers[-1].outputs
    for weight in (recipe.weight, recipe.pos_weight):
        if weight is None:
            continue
        if weight.dtype != dtype or weight.device.type != "cpu":
            return f"the loss's weights are {weight.dtype} on {weight.device}, parameters {dtype}"
        if recipe.loss == 0:
            continue  # torch has refused what is not one number a class
        for examples in problem.tasks.sets():
            row = (examples.count, outputs)
            try:
                fits = torch.broadcast_shapes(weight.shape, row) == row
            except RuntimeError:
                fits = False
            if not fits:
                return f"the loss's weights {list(weight.shape)} don't broadcast to {list(row)}"
    return None


@functools.lru_cache(maxsize=256)
def _kernel(
    recipe: Recipe, adapted: tuple[str, ...], sizes: tuple[int, int, int],
    flags: tuple[bool, bool, bool, bool], prox: float, is_double: bool, tasks: int, isa: str,
    engine: str, form: str,
) -> Any:  # fmt: skip
    module = extension()
    assert module is not None
    layers = [
        (
            layer.inputs, layer.outputs, layer.activation or 0, *layer.options,
            _NORMS.index(layer.norm and layer.norm.batch_statistics),
            layer.norm.eps if layer.norm else 0.0,
            [name is not None for name in layer.tensors()],
            [name in adapted for name in layer.tensors()],
        )
        for layer in recipe.layers
    ]  # fmt: skip
    return module.FusedStep(
        layers, recipe.loss, recipe.loss_option, recipe.ignore_index, recipe.weighted, *sizes,
        *flags, prox, is_double, tasks, isa, engine, form,
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
        *environment(),
    )


def group(problem: Problem, recipe: Recipe) -> tuple[int, int, float]:
    """How many tasks the kernel takes at a time, their storage in bytes, its estimated seconds."""
    step = kernel(problem, recipe)
    return step.tasks, step.storage_bytes, step.seconds


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
    names = [name for layer in recipe.layers for name in layer.tensors()]
    parameters = [None if n is None else named[n].detach().contiguous() for n in names]
    statistics = _statistics(problem, recipe)
    rates = _rates(problem, named, names)
    support, query = (_arrays(examples, recipe) for examples in (tasks.support, tasks.query))
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
        [_address(t) for t in statistics],
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


def _statistics(problem: Problem, recipe: Recipe) -> list[Tensor | None]:
    """Mean and 1 / standard deviation, where running statistics are used."""
    found: list[Tensor | None] = []
    for layer in recipe.layers:
        norm = layer.norm
        if norm is None or norm.batch_statistics:
            found += [None, None]
            continue
        assert norm.mean is not None
        assert norm.variance is not None
        module = problem.model.module
        mean, variance = module.get_buffer(norm.mean), module.get_buffer(norm.variance)
        found += [mean.contiguous(), (variance + norm.eps).rsqrt()]
    return found


def _arrays(examples: Examples | None, recipe: Recipe) -> list[Tensor | None]:
    """Inputs, targets, labels, example weights and the loss's weights."""
    if examples is None:
        return [None] * 5
    x, y, weights = examples.inputs, examples.targets, examples.weights
    floating = y.is_floating_point()
    y, factors = _weigh(y.detach(), recipe)
    y = y.contiguous()
    return [
        x.detach().contiguous(),
        y if floating else None,
        None if floating else y,
        None if weights is None else weights.to(x.dtype).contiguous(),
        factors,
    ]


def _weigh(y: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """The targets and weights of the loss as the kernels take them."""
    weight, pos_weight = recipe.weight, recipe.pos_weight
    if recipe.loss == 0:
        return y, None if weight is None else weight.contiguous()
    if not recipe.weighted:
        return y, None
    # w ((1 - y) z + (1 + (p - 1) y) softplus(-z)) is c softplus(z) - t z with these c and t.
    positive = y if pos_weight is None else y * pos_weight
    factors = 1 - y + positive
    if weight is not None:
        positive, factors = positive * weight, factors * weight
    return positive, factors.contiguous()


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
