"""What one pass over one task does: operators, FLOPs, bytes, buffers written, numbers drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastmeta.network.errors import naming_layers
from fastmeta.network.random_state import generators, have_moved, same_random_numbers
from fastmeta.network.stateless import StatelessModel
from fastmeta.tasks import TaskBatch, map_tensors
from fastmeta.wording import a_kind


@dataclass(frozen=True)
class Profile:
    """Of a forward pass and its loss over one task's support set, per example where marked."""

    operators: int
    flops: int  # per example
    bytes_written: int  # per example: the outputs of all operators
    parameter_bytes: int
    prediction: tuple[int, ...] | None  # [N, ...] of a single tensor, else None
    written_buffers: tuple[str, ...]
    unreached: frozenset[str]
    draws_random: bool
    has_convolution: bool
    has_attention: bool


def profile(
    model: nn.Module,
    objective: Callable[..., Tensor],
    tasks: TaskBatch,
    check: Callable[[tuple[int, ...] | None], None],
) -> Profile:
    """Runs forward and backward once on the first task; model and generators stay as they were.

    `check` is given the prediction's shape before the loss is computed, to refuse bad targets.
    """
    stateless = StatelessModel(model, tuple(name for name, _ in model.named_buffers()))
    parameters = stateless.parameters()
    proxies = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    support = tasks.first(1).support
    # Copies: a forward may write its input.
    inputs, targets = (
        map_tensors(lambda leaf: leaf.detach()[0].clone(), tree)
        for tree in (support.inputs, support.targets)
    )
    weights = None if support.weights is None else support.weights[0]
    before_buffers = dict(model.named_buffers())
    buffers = {name: b.detach().clone() for name, b in before_buffers.items()}
    versions = {name: b._version for name, b in buffers.items()}
    device = next(iter(parameters.values())).device
    with torch.enable_grad(), same_random_numbers(device):
        with naming_layers(model):
            on_query = _shape_on_query(model, tasks, {**proxies, **buffers})
        before = generators(device)
        with _Counter() as counter:
            with naming_layers(model), _no_recomputation():
                prediction = StatelessModel(model)({**proxies, **buffers}, inputs, {})
            single = tuple(prediction.shape) if isinstance(prediction, Tensor) else None
            if single is not None and on_query not in (None, single[1:]):
                single = None  # its shape depends on the number of examples: nothing to hold it to
            check(single)
            loss = objective(prediction, targets, weights)
        draws = have_moved(before, device)
        _check_loss(loss)
        gradients: Any = (
            torch.autograd.grad(loss, list(proxies.values()), allow_unused=True)
            if loss.requires_grad
            else [None] * len(proxies)
        )
    return Profile(
        operators=counter.operators,
        flops=counter.flops // support.count,
        bytes_written=counter.bytes_written // support.count,
        parameter_bytes=sum(p.nbytes for p in proxies.values()),
        prediction=single,
        written_buffers=tuple(
            # Batch norm writes its running statistics behind the version counter's back.
            name
            for name, b in before_buffers.items()
            if buffers[name]._version != versions[name] or not _same(buffers[name], b)
        ),
        unreached=frozenset(name for name, g in zip(proxies, gradients, strict=True) if g is None),
        draws_random=draws,
        has_convolution=counter.seen("convolution"),
        has_attention=counter.seen("scaled_dot_product"),
    )


def _shape_on_query(
    model: nn.Module, tasks: TaskBatch, tensors: dict[str, Tensor]
) -> tuple[int, ...] | None:
    """The shape of one query example's prediction.

    The pass also has a forward cache what it caches by size, outside any transform.
    """
    if tasks.query is None:
        return None
    inputs = map_tensors(lambda leaf: leaf.detach()[0].clone(), tasks.first(1).sets()[1].inputs)
    with torch.enable_grad():  # a forward may differentiate by itself
        output = StatelessModel(model)(tensors, inputs, {})
    return tuple(output.shape[1:]) if isinstance(output, Tensor) else None


class _Counter(TorchDispatchMode):
    """Counts operators, their FLOPs and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.flops = 0
        self.bytes_written = 0
        self._names: set[str] = set()

    def seen(self, part: str) -> bool:
        return any(part in name for name in self._names)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        self._names.add(str(func))
        # torch's own FlopCounterMode hooks every module of the process; its formulas need no hook.
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if not getattr(func, "is_view", False):
            self.bytes_written += sum(
                leaf.nbytes for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)
            )
        return out


_RECOMPUTES = (
    "model: its forward uses torch.utils.checkpoint (or other saved_tensors_hooks), which runs "
    "parts of it again in the backward pass, when the adapted parameters are gone: the gradients "
    'would be silently wrong. Turn checkpointing off; memory="low" keeps memory flat in K'
)


@contextmanager
def _no_recomputation() -> Generator[None, None, None]:
    with ExitStack() as stack:
        # Hooks of the caller's own, around the whole step, only move what is saved.
        with suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES))
        try:
            yield
        except RuntimeError as error:
            if str(error).startswith(_RECOMPUTES):
                raise ValueError(_RECOMPUTES) from None
            raise


def _same(left: Tensor, right: Tensor) -> bool:
    if left.layout != torch.strided:
        return True  # compared by version alone: sparse tensors have no equality
    return torch.equal(left.nan_to_num(), right.nan_to_num())


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: gave {a_kind(loss)}; it must give a tensor")
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn: gave shape {list(loss.shape)}; it must give a 0-d mean over the examples"
        )
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn: its value depends on no parameter (is something detached, or an integer?), "
            "so there is nothing to adapt by"
        )
