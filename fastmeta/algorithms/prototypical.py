"""Prototypical networks (Snell, Swersky and Zemel 2017): classes are means of their embeddings.

With f the embedding and S_c the support examples of class c in a task::

    prototype_c = mean of f(x) over S_c
    score of class c for a query x = -|f(x) - prototype_c|^2   or   scale * cos(f(x), prototype_c)
    loss = cross-entropy of the scores, a mean over the query set
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.algorithms import maml
from fastmeta.arguments import plain_module
from fastmeta.modes import outermost
from fastmeta.options import Loss, Options
from fastmeta.result import MetaStep
from fastmeta.tasks import Tree, map_tensors
from fastmeta.wording import a_kind

DISTANCES = ("euclidean", "cosine")


def prototypical_step(
    model: nn.Module,
    support: Any,
    query: Any,
    *,
    distance: str = "euclidean",
    scale: float | Tensor = 10.0,
    task_weights: Any = None,
    executor: str = "auto",
) -> MetaStep:
    """One step of prototypical networks over a batch of tasks; nothing adapts.

    `out.loss.backward()` adds the gradient to `.grad` of the model's parameters. A task's support
    and query examples go through the model as one batch, support first: batch norm in `train()`
    takes its statistics over both. The model is not changed, its running statistics neither.

    **Arguments:**

    - `model`: an embedding: of `[N, ...]` it gives `[N, E]`.
    - `support`: `(x, y)` with leading `[T, N]`; the labels are 0 to C - 1, each of them in every
        task's support set. For tasks of different sizes, a list with one `(x, y)` a task, each with
        leading `[N]`.
    - `query`: the same with leading `[T, Q]`.
    - `distance`: `"euclidean"`, whose scores are minus squared distances, or `"cosine"`.
    - `scale`: what cosines are multiplied by; a tensor that requires grad gets its gradient.
    - `task_weights`, `executor`: as in `maml_step`.

    **Returns:** a `MetaStep`. `query_outputs` are the scores `[T, Q, C]`, `task_losses` are of the
    query sets; there are no `support_losses`.

    **Raises:** `TypeError` or `ValueError` naming the argument, before anything is computed.

    **Source:** Snell, Swersky and Zemel (2017), Prototypical networks for few-shot learning; for
    cosines Vinyals et al. (2016), Matching networks.
    """
    if distance not in DISTANCES:
        known = ", ".join(map(repr, DISTANCES))
        raise ValueError(f"distance: {distance!r}; it must be one of {known}")
    given: Any = scale
    if not isinstance(given, (int, float, Tensor)) or isinstance(given, bool):
        raise TypeError(f"scale: {a_kind(given)}; it must be a number or a tensor")
    return _take_step(model, support, query, distance, scale, task_weights, executor)


@outermost
def _take_step(
    model: nn.Module, support: Any, query: Any, distance: str, scale: float | Tensor,
    task_weights: Any, executor: str,
) -> MetaStep:  # fmt: skip
    model = plain_module(model)
    ragged = isinstance(support, list)
    given = _listed("support", support), _listed("query", query)
    if ragged != isinstance(query, list) or len(given[0]) != len(given[1]):
        raise ValueError("support and query: both must be pairs, or lists with one pair a task")
    pairs = [*zip(*given, strict=True)]
    classes = max(_classes(of_support, of_query) for of_support, of_query in pairs)
    sets = [_joined(of_support, of_query, 0 if ragged else 1) for of_support, of_query in pairs]
    options = Options(
        inner_steps=0,
        loss_fn=_loss(distance, classes, scale),
        task_weights=task_weights,
        executor=executor,
    )
    joined = sets if ragged else sets[0]
    found = maml.take_step(model, joined, joined, options)
    with torch.no_grad():
        embedded = found.query_outputs if ragged else [found.query_outputs]
        scores = [
            _scores(z, y, is_support, distance, classes, scale)[..., of_support[1].shape[-1] :, :]
            for z, (_, (y, is_support)), (of_support, _) in zip(embedded, sets, pairs, strict=True)
        ]
    outputs: Tree = scores if ragged else scores[0]
    return MetaStep(found.loss, found.task_losses, outputs, found.support_losses, found.executor)


def _loss(distance: str, classes: int, scale: float | Tensor) -> Loss:
    """The loss of one task's embeddings, support and query together."""

    def loss(embedded: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, is_support = targets
        scores = _scores(embedded, labels, is_support, distance, classes, scale)
        each = F.cross_entropy(scores, labels, reduction="none")
        asked = (~is_support).to(each.dtype)
        return (each * asked).sum() / asked.sum()

    return loss


def _scores(
    embedded: Tensor, labels: Tensor, is_support: Tensor, distance: str, classes: int,
    scale: float | Tensor,
) -> Tensor:  # fmt: skip
    """`[..., N, C]` of embeddings `[..., N, E]`, by the prototypes of those in the support set."""
    # Distances stay, and lose no digits to a common offset.
    z = embedded - embedded.mean(-2, keepdim=True) if distance == "euclidean" else embedded
    known = torch.arange(classes, device=labels.device)
    members = ((labels.unsqueeze(-1) == known) & is_support.unsqueeze(-1)).to(
        z.dtype
    )  # [..., N, C]
    counts = members.sum(-2).unsqueeze(-1)
    prototypes = members.transpose(-1, -2) @ z / counts  # [..., C, E]
    if distance == "cosine":
        return scale * F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(-1, -2)
    squares = z.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(-2)
    return 2 * z @ prototypes.transpose(-1, -2) - squares


def _listed(name: str, data: Any) -> list[Any]:
    """One pair a task where the data is ragged, else the one pair of the batch."""
    pairs = data if isinstance(data, list) else [data]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{name}: {a_kind(pair)}; it must be (x, y), or a list of such pairs")
        labels: Any = pair[1]
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"{name}_y: {a_kind(labels)}; it must be a tensor of int64 labels")
    return pairs


def _classes(of_support: Any, of_query: Any) -> int:
    """How many classes the labels name; **raises** where a support set lacks one of them."""
    seen, asked = of_support[1], of_query[1]
    classes = int(torch.cat([seen.flatten(), asked.flatten()]).max()) + 1
    if min(int(seen.min()), int(asked.min())) < 0:
        raise ValueError("support_y and query_y: a negative label; they must be 0 to C - 1")
    counts = (seen.unsqueeze(-1) == torch.arange(classes, device=seen.device)).sum(-2)
    if bool((counts == 0).any()):
        task, label = (counts.view(-1, classes) == 0).nonzero()[0].tolist()
        raise ValueError(
            f"support_y: task {task} has no example of class {label}; every class of 0 to "
            f"{classes - 1} needs one in each task"
        )
    return classes


def _joined(of_support: Any, of_query: Any, axis: int) -> tuple[Tree, tuple[Tensor, Tensor]]:
    """Both sets as one, support first, and which examples are the support's."""
    (x, y), (query_x, query_y) = of_support, of_query
    inputs = map_tensors(lambda a, b: torch.cat([a, b], axis), x, query_x)
    is_support = [torch.ones_like(y, dtype=torch.bool), torch.zeros_like(query_y, dtype=torch.bool)]
    return inputs, (torch.cat([y, query_y], axis), torch.cat(is_support, axis))


class Prototypical(nn.Module):
    """An embedding: `prototypical(support, query)` is `prototypical_step` with these options.

    **Arguments:** as in `prototypical_step`; a `scale` that is an `nn.Parameter` is registered.
    """

    def __init__(
        self, model: nn.Module, *, distance: str = "euclidean", scale: float | Tensor = 10.0,
        executor: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = plain_module(model)
        self.distance = distance
        self.scale = scale
        self.executor = executor

    def forward(self, support: Any, query: Any, *, task_weights: Any = None) -> MetaStep:
        """`prototypical_step` on one batch of tasks."""
        return prototypical_step(
            self.model, support, query, distance=self.distance, scale=self.scale,
            task_weights=task_weights, executor=self.executor,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The distance."""
        return f"distance={self.distance!r}"
