"""Meta-steps drawn by hypothesis: an MLP, a loss, data, and every option that the kernels serve."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import oracle
import rates
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from mlps import ACTIVATIONS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmeta import inner
from fastmeta.inner import InnerOptimizer


@dataclass(frozen=True)
class Case:
    """What hypothesis draws; the numbers in the tensors follow from the seed."""

    widths: list[int]
    activations: list[str]
    bias: bool
    ends_in_activation: bool
    norm: str
    residual: bool
    """Whether layers are followed by residual sums."""
    frozen: bool
    loss: str
    loss_option: float
    ignore_index: int
    weighted: bool
    probabilities: bool
    """Instead of class labels."""
    tasks: int
    support: int
    query: int
    ragged: bool
    steps: int
    rate_kind: str
    adapt: int
    """Bit i: whether parameter i adapts; 0 stands for all."""
    first_order: bool
    prox: float
    step_weights: str
    task_weights: str
    rule: str
    per_step: bool
    query_loss: bool
    """Whether the query sets have a loss of their own."""
    seed: int


WEIGHTS = ("none", "given", "learned")
cases = st.builds(
    Case,
    widths=st.lists(st.integers(1, 11), min_size=2, max_size=5),
    activations=st.lists(st.sampled_from([*ACTIVATIONS]), min_size=4, max_size=4),
    bias=st.booleans(),
    ends_in_activation=st.booleans(),
    norm=st.sampled_from(["none", "none", "batch", "running", "layer", "rms"]),
    residual=st.sampled_from([False, False, True]),
    frozen=st.booleans(),
    loss=st.sampled_from(["cross_entropy", "mse", "bce", "huber", "smooth_l1", "l1"]),
    loss_option=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    ignore_index=st.sampled_from([-100, 0]),
    weighted=st.booleans(),
    probabilities=st.sampled_from([False, False, True]),
    tasks=st.sampled_from([1, 2, 3, 8, 9, 17]),
    support=st.integers(1, 6),
    query=st.integers(1, 6),
    ragged=st.booleans(),
    steps=st.integers(0, 4),
    rate_kind=st.sampled_from(rates.KINDS),
    adapt=st.integers(0, 255),
    first_order=st.booleans(),
    prox=st.sampled_from([0.0, 0.4]),
    step_weights=st.sampled_from(WEIGHTS),
    task_weights=st.sampled_from(WEIGHTS),
    rule=st.sampled_from(["descent"] * 5 + ["momentum", "nesterov", "adam", "adamw", "rmsprop"]),
    per_step=st.sampled_from([False, False, True]),
    query_loss=st.sampled_from([False, False, True]),
    seed=st.integers(0, 2**31),
)


def optimizer(kind: str) -> InnerOptimizer | None:
    """A rule by its kind; epsilons are large, as rounding is magnified by their inverse."""
    if kind == "descent":
        return None
    momentum, first, second = rates.learned(), *(0.5 + rates.learned(2).detach() / 4)
    learned = (first.requires_grad_(), second.requires_grad_())
    return {
        "momentum": inner.SGD(momentum=0.8, dampening=0.1, weight_decay=0.05),
        "nesterov": inner.SGD(momentum=momentum, nesterov=True, max_grad_norm=0.3),
        "adam": inner.Adam(betas=learned, eps=0.05, eps_root=0.01, max_grad_norm=0.5),
        "adamw": inner.AdamW(betas=(0.8, 0.9), eps=0.05, weight_decay=0.1),
        "rmsprop": inner.RMSprop(alpha=second, eps=0.1, momentum=momentum, centered=True),
    }[kind]


def network(case: Case) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(case.widths, case.widths[1:], strict=False)):
        layers.append(nn.Linear(inputs, outputs, bias=case.bias))
        if case.norm != "none" and (case.seed + i) % 2:
            layers.append(norm(outputs, case))
        layers.append(copy.deepcopy(ACTIVATIONS[case.activations[i]]))
        if case.residual and i + 2 < len(case.widths):
            layers.append(Residual(outputs, case))
    if not case.ends_in_activation:
        layers.pop()
    model = nn.Sequential(*layers).double()
    if case.frozen and len(case.widths) > 2:
        model[0].requires_grad_(False)
    return model


class Residual(nn.Module):
    """`x + f(norm(x))`, one linear layer; of every other seed the sum is taken in tanh."""

    def __init__(self, width: int, case: Case) -> None:
        super().__init__()
        self.norm = nn.Identity() if case.norm == "batch" else norm(width, case)
        self.linear = nn.Linear(width, width, bias=case.bias)
        self.is_last = case.seed % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.norm(x))
        return x if self.is_last else torch.tanh(x)


def norm(width: int, case: Case) -> nn.Module:
    if case.norm == "layer":
        return nn.LayerNorm(width, eps=0.125, elementwise_affine=case.bias)
    if case.norm == "rms":
        return nn.RMSNorm(width, eps=0.125, elementwise_affine=case.bias)
    return nn.Identity() if case.norm == "none" else batch_norm(width, case)


def batch_norm(width: int, case: Case) -> nn.BatchNorm1d:
    # A large epsilon, or two examples that are nearly alike would magnify every rounding error.
    norm = nn.BatchNorm1d(width, eps=0.125, affine=case.bias)
    norm.running_mean = torch.randn(width)
    norm.running_var = 0.5 + torch.rand(width)
    norm.num_batches_tracked += 1  # or they would count as never written
    return norm.train(case.norm == "batch")


def loss_function(
    case: Case, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"
) -> Callable[[Any, Any], Tensor]:
    classes = case.widths[-1]
    weight = torch.linspace(0.5, 2, classes).to(device, dtype) if case.weighted else None
    if case.loss == "cross_entropy":
        smoothing = case.loss_option if case.loss_option < 1 else 0.0
        ignore = case.ignore_index if classes > 1 and not case.probabilities else -100
        return nn.CrossEntropyLoss(weight, ignore_index=ignore, label_smoothing=smoothing)
    option = case.loss_option or 1.0
    of_positives = weight.flip(0) if weight is not None and case.loss_option else None
    return {
        "mse": F.mse_loss,
        "bce": nn.BCEWithLogitsLoss(weight, pos_weight=of_positives),
        "huber": functools.partial(F.huber_loss, delta=option),
        "smooth_l1": nn.SmoothL1Loss(beta=option),
        "l1": F.l1_loss,
    }[case.loss]


def query_loss(case: Case) -> Callable[[Any, Any], Tensor] | None:
    """A loss of the query sets' own, which has no corners."""
    return F.mse_loss if case.query_loss else None


def examples(
    case: Case, count: int, shape: tuple[int, ...], of_query: bool = False
) -> tuple[Tensor, Tensor]:
    """[T, N, *shape] and [T, N] or [T, N, C]; [T, K, N, ...] with a support set a step."""
    steps = (case.steps,) if case.per_step and not of_query else ()
    front = (case.tasks, *steps, count)
    x = torch.randn(*front, *shape).double()
    outputs = case.widths[-1]
    numbers = case.loss != "cross_entropy" or case.probabilities or (of_query and case.query_loss)
    if numbers:
        return x, torch.rand(*front, outputs).double()
    y = torch.randint(outputs, front)
    y[..., 0] = outputs - 1  # never the one that is ignored: no mean is of nothing
    return x, y


def weights(kind: str, count: int) -> Tensor | None:
    if kind == "none":
        return None
    drawn = rates.learned(count)
    if kind == "learned":
        return drawn
    # Zeros are special: what they weigh may be left out.
    return torch.where(torch.arange(count) % 2 == 0, drawn.detach(), 0.0)


def ragged(data: tuple[Tensor, Tensor], axis: int = 1) -> list[tuple[Tensor, Tensor]]:
    x, y = data
    fewest = min(2, x.shape[axis])  # batch norm takes two
    counts = [int(torch.randint(fewest, x.shape[axis] + 1, ())) for _ in range(len(x))]
    cut = axis - 1
    return [(x[i].narrow(cut, 0, n), y[i].narrow(cut, 0, n)) for i, n in enumerate(counts)]


@dataclass
class Drawn:
    """A case's tensors; what is drawn in float64 is the same in float32."""

    case: Case
    model: nn.Sequential
    support: Any
    query: Any
    inner_lr: Any
    step_weights: Tensor | None
    task_weights: Tensor | None
    adapt: list[str] | None
    rule: InnerOptimizer | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Drawn:
        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if not leaf.is_floating_point():
                return leaf.to(device)
            return leaf.detach().to(device, dtype).requires_grad_(leaf.requires_grad)

        parts = (self.support, self.query, self.inner_lr, self.step_weights, self.task_weights)
        converted = pytree.tree_map(convert, parts)
        model = copy.deepcopy(self.model).to(device, dtype)
        rule = self.rule and self.rule.with_leaves(pytree.tree_map(convert, self.rule.leaves()))
        return Drawn(self.case, model, *converted, self.adapt, rule)

    def tasks(self) -> list[tuple[Any, Any, Any, Any]]:
        if isinstance(self.support, list):
            return [(*s, *q) for s, q in zip(self.support, self.query, strict=True)]
        return oracle.split(self.support, self.query)

    def leaves(self) -> list[Tensor]:
        of_rule = self.rule.leaves() if self.rule else {}
        given = pytree.tree_leaves((self.inner_lr, self.step_weights, self.task_weights, of_rule))
        learned = [leaf for leaf in given if isinstance(leaf, Tensor) and leaf.requires_grad]
        return [p for p in self.model.parameters() if p.requires_grad] + learned

    def reference(self, loss_fn: Callable[[Any, Any], Tensor]) -> oracle.Reference:
        case = self.case
        return oracle.maml(
            self.model, self.tasks(), self.leaves(),
            rate=rates.reader(case.rate_kind, self.inner_lr), steps=case.steps, loss_fn=loss_fn,
            adapted=self.adapt, first_order=case.first_order, step_weights=self.step_weights,
            task_weights=self.task_weights, prox=case.prox, rule=self.rule, per_step=case.per_step,
            query_loss_fn=query_loss(case),
        )  # fmt: skip

    def options(self) -> dict[str, Any]:
        case, like = self.case, self.model[0].weight
        return {
            "inner_lr": self.inner_lr, "inner_steps": case.steps, "adapt": self.adapt,
            "loss_fn": loss_function(case, like.dtype, like.device),
            "first_order": case.first_order, "prox": case.prox,
            "step_weights": self.step_weights, "task_weights": self.task_weights,
            "inner_optimizer": self.rule, "per_step_support": case.per_step,
            "query_loss_fn": query_loss(case),
        }  # fmt: skip


def draw(
    case: Case,
    make: Callable[[Case], nn.Sequential] = network,
    shape: tuple[int, ...] | None = None,
) -> Drawn:
    """The case's tensors, in float64; examples of that shape, or rows."""
    if case.per_step and not case.steps:
        case = replace(case, per_step=False)
    torch.manual_seed(case.seed)
    model = make(case)
    trainable = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    chosen = [name for i, name in enumerate(trainable) if case.adapt >> i & 1]
    adapted = chosen or [*trainable]
    inner_lr = rates.by_kind(case.rate_kind, case.steps, {n: trainable[n] for n in adapted})
    more = case.norm == "batch"
    shape = shape or (case.widths[0],)
    support = examples(case, case.support + more, shape)
    query = examples(case, case.query + more, shape, of_query=True)
    return Drawn(
        case, model,
        ragged(support, 2 if case.per_step else 1) if case.ragged else support,
        ragged(query) if case.ragged else query,
        inner_lr, weights(case.step_weights, case.steps + 1),
        weights(case.task_weights, case.tasks), chosen or None, optimizer(case.rule),
    )  # fmt: skip
