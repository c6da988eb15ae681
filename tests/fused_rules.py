"""A small network's step by the compiled kernels on raw tensors, and by autograd."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import host_cuda
import torch
import torch.nn.functional as F
from fused_kernels import ON_HOST
from raw_rules import learned_options, rule
from torch import Tensor

from fastmeta import _C
from fastmeta.executors.fused.lowering import NONE

TANH, RELU, IDENTITY = 3, 1, 0
CROSS_ENTROPY, MSE, BINARY = 0, 1, 2
TENSORS = 4


@dataclass
class Case:
    """A meta-step: sizes, options, and the data that a seed gives."""

    widths: tuple[int, ...] = (3, 5, 4, 2)
    tasks: int = 3
    support: int = 4
    query: int = 5
    steps: int = 2
    rule: dict[str, Any] = field(default_factory=dict)
    elementwise: bool = False
    learned_rates: bool = False
    first_order: bool = False
    prox: float = 0.0
    step_weights: tuple[float, ...] = ()
    adapted: tuple[bool, ...] = ()
    """By layer and tensor (weight, bias); empty: all."""
    ragged: bool = False
    per_step: bool = False
    support_loss: int = MSE
    """Or binary cross-entropy, with factors."""
    query_loss: int = MSE
    query_options: dict[str, Any] = field(default_factory=dict)
    """Of the cross-entropy."""
    activation: int = TANH
    dtype: torch.dtype = torch.float64
    seed: int = 0
    rate: float = 0.1
    form: str = ""
    memory: str = ""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.parameters = [
            draw(*shape) / shape[-1] ** 0.5
            for n, m in itertools.pairwise(self.widths)
            for shape in ((m, n), (m,))
        ]
        self.adapts = self.adapted or (True,) * len(self.parameters)
        self.weights = self.step_weights or (0.0,) * self.steps + (1.0,)
        sets = (self.tasks, self.steps) if self.per_step else (self.tasks,)
        out = self.widths[-1]
        self.support_x = draw(*sets, self.support, self.widths[0])
        self.support_y = draw(*sets, self.support, out)
        self.query_x = draw(self.tasks, self.query, self.widths[0])
        self.query_y: Tensor = draw(self.tasks, self.query, out)
        if self.query_loss == CROSS_ENTROPY:
            self.query_y = self.query_y.argmax(-1)
            if "ignore_index" in self.query_options:  # of every second example
                self.query_y[:, 1::2] = self.query_options["ignore_index"]
        self.factors = None
        if self.support_loss == BINARY:
            self.support_y = self.support_y.sigmoid()
            self.factors = 0.5 + draw(*self.support_y.shape).sigmoid()
        counts = torch.randint(1, self.support + 1, sets, generator=generator)
        real = (torch.arange(self.support) < counts[..., None]).double()
        self.support_weights = real / real.sum(-1, keepdim=True) if self.ragged else None
        self.task_weights = torch.rand(self.tasks, generator=generator, dtype=torch.float64)
        self.rates = [
            self.rate * (0.5 + torch.rand(p.shape if self.elementwise else (), generator=generator,
                                          dtype=torch.float64))
            for _ in range(self.steps) for p in self.parameters
        ]  # fmt: skip

    def with_dtype(self, dtype: torch.dtype) -> Case:
        """The same numbers in another type."""
        return replace(self, dtype=dtype)


@dataclass
class Found:
    """The results of a step; `rates` by step and tensor, None where it does not adapt."""

    support_losses: Tensor
    step_losses: Tensor
    outputs: Tensor
    parameters: list[Tensor] = field(default_factory=list)
    rates: list[Tensor | None] = field(default_factory=list)
    options: list[Tensor] = field(default_factory=list)
    adapted: list[Tensor] = field(default_factory=list)
    form: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        named = {"support losses": self.support_losses, "step losses": self.step_losses,
                 "outputs": self.outputs}  # fmt: skip
        for name in ("parameters", "rates", "options"):
            for i, tensor in enumerate(getattr(self, name)):
                if tensor is not None:
                    named[f"{name} {i}"] = tensor
        return named


# --- the compiled kernels


def compiled(case: Case, differentiate: bool = True) -> Found:
    """The step of the kernel that the environment names."""
    depth, count = len(case.widths) - 1, len(case.parameters)
    layers = [
        (
            n, m, IDENTITY if i == depth - 1 else case.activation, 0.0, 0.0, 0, 0.0,
            [True, True, False, False], [*case.adapts[2 * i : 2 * i + 2], False, False],
            (i - 1, NONE, False),
        )
        for i, (n, m) in enumerate(itertools.pairwise(case.widths))
    ]  # fmt: skip
    described = rule(**case.rule)
    arguments = (
        layers, case.support_loss, 0.0, -100, case.factors is not None, case.support, case.query,
        case.steps, differentiate, case.first_order, case.elementwise,
        case.learned_rates and differentiate, case.prox, case.dtype == torch.float64, case.tasks,
    )  # fmt: skip
    of_classes = case.query_options
    class_weights = of_classes.get("weight")
    query_loss = (
        case.query_loss, of_classes.get("label_smoothing", 0.0),
        of_classes.get("ignore_index", -100), class_weights is not None,
    )  # fmt: skip
    options = (described.description, case.per_step, query_loss)
    evaluates = [k == case.steps or w != 0 for k, w in enumerate(case.weights)]

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(case.dtype).contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=case.dtype)

    def four(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return [each for pair in pairs for each in (*pair, None, None)]

    parameters = four([cast(p) for p in case.parameters])
    labels = case.query_loss == CROSS_ENTROPY
    sets = [
        [cast(case.support_x), cast(case.support_y), None, cast(case.support_weights),
         cast(case.factors)],
        [cast(case.query_x), None if labels else cast(case.query_y),
         case.query_y if labels else None, None, cast(class_weights)],
    ]  # fmt: skip
    if case.elementwise:
        rates = torch.cat([rate.flatten() for rate in case.rates]) if case.steps else empty(0)
    else:
        rates = torch.zeros(case.steps, depth, TENSORS, dtype=torch.float64)
        rates[..., :2] = torch.stack(case.rates).view(case.steps, depth, 2) if case.steps else 0
    rates = cast(rates)
    adapted: list[Tensor | None] = []
    if not differentiate:
        adapted = four([empty(case.tasks, *p.shape) if a else None
                        for p, a in zip(case.parameters, case.adapts, strict=True)])  # fmt: skip
    support_losses = empty(case.steps, case.tasks)
    step_losses = torch.zeros(case.steps + 1, case.tasks, dtype=case.dtype)
    outputs = empty(case.tasks, case.query, case.widths[-1])
    weights = cast(case.task_weights)
    kept = [parameters, sets, rates, adapted, weights]

    def at(tensors: Sequence[Tensor | None]) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in tensors]

    assert rates is not None
    assert weights is not None
    written = (support_losses.data_ptr(), step_losses.data_ptr(), outputs.data_ptr())
    form = case.form if differentiate else "primal"  # the dual one never makes its weight
    if ON_HOST:
        gradient, form = _on_host(
            case, form, arguments, options, evaluates, at, kept, described.options, written, empty
        )
    else:
        isa, engine = (os.environ.get(f"FASTMETA_{name}", "") for name in ("ISA", "ENGINE"))
        step = _C.FusedStep(*arguments, isa, engine, form, case.memory, *options)
        gradient, form = empty(step.gradients if differentiate else 0), step.form
        assert step.run(
            case.tasks, at(parameters), at(adapted), [0] * (2 * depth), rates.data_ptr(),
            list(case.weights), evaluates, weights.data_ptr(), *map(at, sets), *written,
            gradient.data_ptr(), 1, described.options,
        )  # fmt: skip
    found = Found(support_losses, step_losses, outputs, form=form)
    if not differentiate:
        found.adapted = [t for t in adapted if t is not None]
        return found
    sizes = [p.numel() for p in case.parameters]
    parts = gradient.split([sum(sizes), gradient.numel() - sum(sizes)])
    found.parameters = [
        part.view_as(p) for part, p in zip(parts[0].split(sizes), case.parameters, strict=True)
    ]
    learned = len(learned_options(described))
    rest, found.options = parts[1], []
    if learned:
        rest, tail = rest[:-learned], rest[-learned:]
        found.options = list(tail.unbind())
    if case.learned_rates:
        if case.elementwise:
            each = [
                r.view_as(p)
                for r, p in zip(
                    rest.split(sizes * case.steps), case.parameters * case.steps, strict=True
                )
            ]
        else:
            each = list(rest.view(case.steps, depth, TENSORS)[..., :2].flatten().unbind())
        found.rates = [r if case.adapts[i % count] else None for i, r in enumerate(each)]
    else:
        assert rest.numel() == 0
    return found


def _on_host(
    case: Case, form: str, arguments: Any, options: Any, evaluates: Any, at: Any, kept: Any,
    numbers: list[float], written: Any, empty: Any,
) -> tuple[Tensor, str]:  # fmt: skip
    """The gradient and form of the CUDA kernels, which lie on the host and are executed there."""
    module = host_cuda.module()
    parameters, sets, rates, adapted, weights = kept
    storage, threads = (os.environ.get(f"FASTMETA_CUDA_{n}", "") for n in ("STORAGE", "THREADS"))
    step = module.CudaStep(
        *arguments, evaluates, form, case.memory, storage, int(threads or 0), module.limits(0),
        *options,
    )  # fmt: skip
    assert step.serves
    image = torch.empty(len(step.image(0)), dtype=torch.uint8)
    image.copy_(torch.frombuffer(bytearray(step.image(image.data_ptr())), dtype=torch.uint8))
    workspace, gradient = empty(step.workspace), empty(step.gradients)
    (x, *_), (q, *_) = sets
    products: list[Tensor] = []
    if step.dual:
        w = parameters[0]
        products = [
            x @ w.T,
            q @ w.T,
            x @ x.mT,
            q @ x.mT,
            *(empty(*z.shape[:2], len(w)) for z in (x, q)),
        ]
    partials = empty(step.blocks * step.gradients)
    step_weights = torch.tensor(case.weights, dtype=case.dtype)
    numbers_at = torch.tensor(numbers, dtype=torch.float64)
    step.run(
        image.data_ptr(), at(parameters), at(adapted), [0] * (len(parameters) // 2),
        rates.data_ptr(), step_weights.data_ptr(), weights.data_ptr(), *map(at, sets), at(products),
        *written, workspace.data_ptr(), partials.data_ptr(), gradient.data_ptr(), False, 0, 0,
        numbers_at.data_ptr(),
    )  # fmt: skip
    if not step.dual:
        return gradient, "primal"
    first = torch.einsum("tqh,tqd->hd", products[5], q)
    if not case.first_order:
        first += torch.einsum("tnh,tnd->hd", products[4], x)
    return torch.cat([first.flatten(), gradient]), "dual"


# --- autograd


def reference(case: Case) -> Found:
    """The same step one task at a time, by autograd through torch's operators."""
    theta = [p.clone().requires_grad_() for p in case.parameters]
    rates = [r.clone().requires_grad_() for r in case.rates]
    options = dict(case.rule)
    kind = options.pop("kind", "sgd")
    learned = [options[name] for name in learned_options(rule(**case.rule))]
    support_losses, step_losses, outputs = [], [], []
    for t in range(case.tasks):
        phi, state, losses, at_query = list(theta), {}, [], []
        for k in range(case.steps + 1):
            output = network(case, phi, case.query_x[t])
            at_query.append(
                loss(case.query_loss, output, case.query_y[t], None, **case.query_options)
            )
            if k == case.steps:
                outputs.append(output.detach())
                break
            where = (t, k) if case.per_step else (t,)
            weights = None if case.support_weights is None else case.support_weights[where]
            factors = {} if case.factors is None else {"factors": case.factors[where]}
            value = loss(
                case.support_loss, network(case, phi, case.support_x[where]),
                case.support_y[where], weights, **factors,
            )  # fmt: skip
            losses.append(value.detach())
            inner = [i for i, adapts in enumerate(case.adapts) if adapts]
            found = torch.autograd.grad(value, [phi[i] for i in inner], create_graph=True)
            g = [f + case.prox * (phi[i] - theta[i]) for f, i in zip(found, inner, strict=True)]
            if case.first_order:
                g = [one.detach() for one in g]
            moved = updated(
                kind, options, k, [phi[i] for i in inner], g,
                [rates[k * len(theta) + i] for i in inner], state,
            )  # fmt: skip
            for i, new in zip(inner, moved, strict=True):
                phi[i] = new
        support_losses.append(torch.stack(losses) if losses else torch.empty(0))
        step_losses.append(torch.stack(at_query))
    each = torch.stack(step_losses, 1)  # [K + 1, T]
    weights = torch.tensor(case.weights, dtype=torch.float64)
    total = (weights[:, None] * each * case.task_weights).sum()
    evaluated = weights != 0
    evaluated[-1] = True
    leaves = [*theta, *rates, *learned]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    count = len(theta)
    return Found(
        torch.stack(support_losses, 1), each.detach() * evaluated[:, None], torch.stack(outputs),
        grads[:count],
        [g if case.adapts[i % count] else None
         for i, g in enumerate(grads[count : count + len(rates)])] if case.learned_rates else [],
        grads[count + len(rates) :],
    )  # fmt: skip


def network(case: Case, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The multilayer perceptron."""
    for i in range(0, len(parameters), 2):
        x = F.linear(x, parameters[i], parameters[i + 1])
        if i + 2 < len(parameters):
            x = torch.tanh(x) if case.activation == TANH else torch.relu(x)
    return x


def loss(kind: int, output: Tensor, y: Tensor, weights: Tensor | None, **options: Any) -> Tensor:
    """The mean over examples, or by their weights."""
    if kind == CROSS_ENTROPY:
        return F.cross_entropy(output, y, **options)
    each = (output - y).square()
    if kind == BINARY:
        each = options["factors"] * F.softplus(output) - output * y
    each = each.mean(-1)
    return each.mean() if weights is None else (weights * each).sum()


def updated(
    kind: str, options: dict[str, Any], step: int, theta: list[Tensor], g: list[Tensor],
    rates: list[Tensor], state: dict[str, list[Any]],
) -> list[Tensor]:  # fmt: skip
    """One step of `torch.optim`'s optimizer, written with torch's operators."""
    most = options.get("max_grad_norm")
    if most is not None:
        norm = torch.sqrt(sum((one.square().sum() for one in g), torch.zeros(()).double()))
        g = [one * (most / norm) if norm > most else one for one in g]
    decay, decoupled = options.get("weight_decay", 0.0), options.get("decoupled", False)
    shrunk = theta
    if decay and decoupled:
        shrunk = [p - a * decay * p for p, a in zip(theta, rates, strict=True)]
    elif decay:
        g = [one + decay * p for one, p in zip(g, theta, strict=True)]
    zeros = [torch.zeros_like(p) for p in theta]
    if kind == "sgd":
        directions = _sgd(options, step, g, state)
    elif kind == "adam":
        directions = _adam(options, step, g, state, zeros)
    else:
        directions = _rmsprop(options, g, state, zeros)
    return [p - a * d for p, a, d in zip(shrunk, rates, directions, strict=True)]


def _sgd(options: dict[str, Any], step: int, g: list[Tensor], state: Any) -> list[Tensor]:
    mu = options.get("momentum", 0.0)
    if not isinstance(mu, Tensor) and mu == 0:
        return g
    gain = 1 - options.get("dampening", 0.0)
    buffers = g
    if step > 0:
        buffers = [mu * m + gain * one for m, one in zip(state["m"], g, strict=True)]
    state["m"] = buffers
    if options.get("nesterov"):
        return [one + mu * m for one, m in zip(g, buffers, strict=True)]
    return buffers


def _adam(
    options: dict[str, Any], step: int, g: list[Tensor], state: Any, zeros: list[Tensor]
) -> list[Tensor]:
    b1, b2 = options.get("beta1", 0.9), options.get("beta2", 0.999)
    eps, root = options.get("eps", 1e-8), options.get("eps_root", 0.0)
    first, second = state.get("m", zeros), state.get("v", zeros)
    first = [b1 * m + (1 - b1) * one for m, one in zip(first, g, strict=True)]
    second = [b2 * v + (1 - b2) * one * one for v, one in zip(second, g, strict=True)]
    state["m"], state["v"] = first, second
    c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    return [(m / c1) / (_root(v / c2 + root) + eps) for m, v in zip(first, second, strict=True)]


def _rmsprop(
    options: dict[str, Any], g: list[Tensor], state: Any, zeros: list[Tensor]
) -> list[Tensor]:
    alpha, mu = options.get("beta2", 0.999), options.get("momentum", 0.0)
    second = [alpha * v + (1 - alpha) * one * one
              for v, one in zip(state.get("v", zeros), g, strict=True)]  # fmt: skip
    variance = second
    if options.get("centered"):
        mean = [alpha * m + (1 - alpha) * one
                for m, one in zip(state.get("m", zeros), g, strict=True)]  # fmt: skip
        state["m"] = mean
        variance = [v - m * m for v, m in zip(second, mean, strict=True)]
    eps = options.get("eps", 1e-8)
    directions = [one / (_root(v) + eps) for one, v in zip(g, variance, strict=True)]
    buffers = [mu * b + d for b, d in zip(state.get("b", zeros), directions, strict=True)]
    state["v"], state["b"] = second, buffers
    return buffers


def _root(x: Tensor) -> Tensor:
    """The square root, without a slope where it is zero."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
