"""`linearize`: losses, gradients and Hessian-vector products of many tasks, on one saved pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.arguments import linearize_request, outside_inference, plain_module
from fastmeta.executors.linearized import Linearized
from fastmeta.options import Loss, Options
from fastmeta.plan import planner
from fastmeta.tasks import Tree
from fastmeta.wording import a_kind


class Linearization:
    """A model and its loss near one point a task; all of it detached."""

    outputs: Tree
    """The predictions, leaves `[T, N, ...]`."""
    losses: Tensor
    """`[T]`: each task's mean loss."""
    gradients: dict[str, Tensor]
    """By parameter name, `[T, ...]`."""

    def __init__(
        self, found: Linearized, parameters: Mapping[str, Tensor], read: Iterable[Tensor]
    ) -> None:
        self._found, self._parameters = found, parameters
        self._versions = [(tensor, tensor._version) for tensor in read]
        self.outputs, self.losses = found.outputs, found.losses
        self.gradients = self._whole(found.gradients)

    def hvp(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply each task's Hessian with its vector, on what the one pass saved.

        **Arguments:** `vectors`: by parameter name, `[T, ...]`; every trainable parameter.

        **Raises** `ValueError` for a name that is missing or unknown, or another shape, and
        `RuntimeError` where the model, its data or `parameters` were written to since.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "hvp: the model, its data or the parameters given were changed in place since "
                "linearize, whose pass it multiplies by; linearize again"
            )
        checked = _checked("vectors", vectors, self._parameters)
        return self._whole(self._found.product(checked))

    def _whole(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With zeros of what nothing reaches."""
        return {
            n: found[n] if n in found else torch.zeros_like(p) for n, p in self._parameters.items()
        }


def linearize(
    model: nn.Module,
    data: Any,
    *,
    loss_fn: Loss = F.cross_entropy,
    parameters: Mapping[str, Tensor] | None = None,
) -> Linearization:
    """Linearize a model at one point a task: the primitive of bilevel algorithms of your own.

    One forward and one backward pass of all tasks; then as many Hessian-vector products as wanted.
    For example, `(I + H / prox)^-1 g` by conjugate gradients, all tasks at once::

        at = fastmeta.linearize(model, (x, y), parameters=adapted)
        dot = lambda a, b: sum((a[n] * b[n]).flatten(1).sum(1) for n in a)  # [T]
        scaled = lambda s, a, b: {n: b[n] + s.view(-1, *[1] * (b[n].dim() - 1)) * a[n] for n in a}
        x = {n: torch.zeros_like(g) for n, g in at.gradients.items()}
        r = p = at.gradients
        for _ in range(5):
            h = at.hvp(p)
            h = {n: p[n] + h[n] / prox for n in p}
            s = dot(r, r) / dot(p, h)
            x, new = scaled(s, p, x), scaled(-s, h, r)
            p, r = scaled(dot(new, new) / dot(r, r), p, new), new

    The model is not changed.

    **Arguments:**

    - `model`: any `nn.Module`, as in `maml_step`.
    - `data`: `(x, y)` with leading `[T, N]`.
    - `loss_fn`: `loss_fn(prediction, target)`, a 0-d mean over the examples of one task.
    - `parameters`: by name `[T, ...]`, all trainable parameters; None is the model's own.

    **Returns** a `Linearization`: `outputs`, `losses` `[T]`, `gradients` `{name: [T, ...]}` and
    `hvp({name: [T, ...]})`.

    **Raises** `TypeError` or `ValueError` naming the argument, before anything is computed.

    **Source:** Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    model = plain_module(model)
    with torch.inference_mode(False), torch.no_grad(), planner.stepping(model) as seen:
        options = Options(loss_fn=loss_fn, inner_steps=0)
        request = linearize_request(model, seen, outside_inference(data), options)
        tasks = request.tasks.tasks
        own = {name: p.detach() for name, p in seen.parameters.items() if p.requires_grad}
        own = {name: p.expand(tasks, *p.shape) for name, p in own.items()}
        given = own if parameters is None else _checked("parameters", parameters, own)
        found = planner.linearize(request, given)
        read = [*model.parameters(), *model.buffers(), *given.values()]
        return Linearization(found, given, [*read, *request.tasks.support.leaves()])


def _checked(label: str, given: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, detached; **raises** where they are not shaped as those of `like`."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{label}: {a_kind(given)}; it must be a dict by parameter name")
    for name in given:
        if name not in like:
            raise ValueError(f"{label}: {name!r} is no trainable parameter of the model")
    for name, parameter in like.items():
        if name not in given:
            raise ValueError(f"{label}: no entry for {name!r}")
        value: Any = given[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{label}[{name!r}]: {a_kind(value)}; it must be a tensor")
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            raise ValueError(
                f"{label}[{name!r}]: {value.dtype} of shape {list(value.shape)}; it must be "
                f"{parameter.dtype} of shape [T, ...] = {list(parameter.shape)}"
            )
    return {name: given[name].detach() for name in like}
