"""Data of a model as compiled steps read it, gradients back from there, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.utils._device import DeviceContext

from fastmeta.executors import rates, update_rule
from fastmeta.executors.addresses import check_storage, overrides
from fastmeta.executors.base import NotSupported
from fastmeta.executors.kernel_loss import KernelLoss
from fastmeta.executors.problem import Problem
from fastmeta.tasks import Examples
from fastmeta.wording import a_kind


class Norm(Protocol):
    """What is read of a batch norm."""

    @property
    def mean(self) -> str | None: ...

    @property
    def variance(self) -> str | None: ...

    @property
    def eps(self) -> float: ...

    @property
    def batch_statistics(self) -> bool: ...


def watched() -> bool:
    """Whether a mode sees operators: fake tensors, counters, tracers; a default device is none."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def statistics(problem: Problem, norms: Iterable[Norm | None]) -> list[Tensor | None]:
    """Mean and 1 / standard deviation of each, where running statistics are used."""
    found: list[Tensor | None] = []
    for norm in norms:
        if norm is None or norm.batch_statistics:
            found += [None, None]
            continue
        assert norm.mean is not None
        assert norm.variance is not None
        module = problem.model.module
        mean, variance = module.get_buffer(norm.mean), module.get_buffer(norm.variance)
        check_storage(variance, norm.variance)  # torch itself reads what was freed
        found += [mean, (variance + norm.eps).rsqrt()]
    return found


def gradients(
    problem: Problem, names: Sequence[str | None], packed: Tensor
) -> list[tuple[Tensor, Tensor | None]]:
    """Every leaf with its gradient: views of `packed`, parameters, learned rates, then options."""
    named: dict[str, Any] = problem.model.all_parameters()
    used = [name for name in names if name is not None]
    parts = _unflatten_dense_tensors(packed, [named[name] for name in used])
    by_name = dict(zip(used, parts, strict=True))
    pairs: list[tuple[Tensor, Tensor | None]] = [
        (parameter, by_name.get(name)) for name, parameter in problem.model.parameters().items()
    ]
    inner = problem.inner
    if inner.learned_rates():
        start = sum(part.numel() for part in parts)
        # Not by division: no steps have rates too.
        width = start if rates.elementwise(inner) else len(names)
        # Learned options of an update rule may follow.
        found = packed[start : start + inner.steps * width].view(inner.steps, width)
        pairs += rates.gradients(inner, named, names, found)
    pairs += update_rule.option_gradients(inner, packed)
    return pairs


def check(problem: Problem, used: Iterable[str]) -> torch.dtype:
    """The dtype of the parameters of these names, at least one.

    **Raises** `NotSupported` where compiled steps, or the layers' rules, can't take them.
    """
    names, device = list(used), problem.task_weights.device
    named = problem.model.all_parameters()
    if watched():
        raise NotSupported("a mode of torch's is on, which would see nothing of a compiled step")
    given = [leaf for examples in problem.tasks.sets() for leaf in examples.leaves()]
    for tensor in (*named.values(), *given):
        if overrides(tensor):
            raise NotSupported(f"a tensor is {a_kind(tensor)}, whose operators are its own")
    if any(name not in named for name in names):
        raise NotSupported("a layer's weight is a buffer")
    dtype = named[names[0]].dtype
    if dtype not in (torch.float32, torch.float64):
        raise NotSupported(f"parameters are {dtype}, not float32 or float64")
    for name in names:
        if named[name].device != device:
            raise NotSupported(f"parameters are on {named[name].device}, task_weights on {device}")
        if named[name].dtype != dtype:
            raise NotSupported("parameters are of different dtypes")
    if torch.is_autocast_enabled(device.type):
        raise NotSupported(
            "autocast is on, and the kernels compute in the parameters' own precision; leave it off"
        )
    if not problem.inner.adapted:
        raise NotSupported("no layer reads a parameter that adapts")
    if problem.task_weights.dtype != dtype:
        raise NotSupported("task_weights are of another dtype than the parameters")
    return dtype


def check_buffers(problem: Problem, norms: Iterable[Norm | None], dtype: torch.dtype) -> None:
    """**Raises** `NotSupported` where a pass writes more than running statistics.

    These may be written, because every pass's are thrown away.
    """
    module, device = problem.model.module, problem.task_weights.device
    written = set(problem.model.written)
    for norm in norms:
        if norm is None:
            continue
        found = [name for name in (norm.mean, norm.variance) if name]
        written.difference_update(found)
        if norm.batch_statistics:
            continue
        buffers = dict(module.named_buffers())
        for name in found:
            if name not in buffers or buffers[name].requires_grad:
                raise NotSupported("running statistics are no constant buffers")
            if buffers[name].dtype != dtype or buffers[name].device != device:
                raise NotSupported(
                    f"running statistics are {buffers[name].dtype}, parameters {dtype}"
                )
    for name in list(written):
        owner, _, counter = name.rpartition(".")
        norm_types = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
        if counter == "num_batches_tracked" and type(module.get_submodule(owner)) in norm_types:
            written.remove(name)
    if written:
        raise NotSupported("a forward pass writes buffers")


def check_inputs(examples: Examples, differentiate: bool, dtype: torch.dtype) -> None:
    """**Raises** `NotSupported` for inputs that are not one tensor of the parameters' dtype."""
    x = examples.inputs
    if not isinstance(x, Tensor):
        raise NotSupported("inputs are trees")
    if differentiate and any(leaf.requires_grad for leaf in examples.leaves()):
        raise NotSupported("inputs or targets require grad")
    if x.dtype != dtype:
        raise NotSupported(f"inputs are {x.dtype}, parameters {dtype}")
    if x.shape[1:].numel() == 0:
        raise NotSupported("a set is empty")


def check_targets(examples: Examples, dtype: torch.dtype) -> None:
    """**Raises** `NotSupported` for targets that are not one tensor, of labels or of this dtype."""
    y = examples.targets
    if not isinstance(y, Tensor):
        raise NotSupported("targets are trees")
    if y.is_floating_point() and y.dtype != dtype:
        raise NotSupported(f"targets are {y.dtype}, parameters {dtype}")


def check_rows(examples: Examples, loss: KernelLoss, shape: tuple[int, ...]) -> None:
    """**Raises** `NotSupported` where a compiled loss can't read targets for such predictions."""
    y = examples.targets
    if loss.of_classes and not y.is_floating_point():
        if y.dim() != 2:
            raise NotSupported("labels are not one an example")
    elif not y.is_floating_point():
        raise NotSupported(f"targets are {y.dtype}")
    elif tuple(y.shape[2:]) != shape:
        raise NotSupported(f"targets are not {list(shape)} an example, as predictions are")
