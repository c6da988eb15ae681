"""All that a step depends on, in one place, and a step of it beside plain autograd."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

NETWORKS = ("vector", "image", "residual")
WIDTH, CLASSES = 4, 3
TORCHS = ("ReLU", "LeakyReLU", "ELU", "Softplus", "BatchNorm", "GroupNorm", "Dropout", "ListConv")
REGRESSIONS = ("huber module", "smooth L1 module")


def loaded(name: str = "user_code") -> ModuleType:
    """A module of the user's, loaded afresh."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READERS = tuple(name for name in vars(loaded()) if name.startswith("By"))


def losses(code: ModuleType) -> dict[str, Any]:
    """The losses by name."""
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return {
        "cross_entropy": F.cross_entropy,
        "lambda": lambda p, y: F.cross_entropy(p, y),
        "by global": code.loss_by_global,
        "by helper": code.loss_by_helper,
        "by default": code.loss_by_default,
        "by keyword default": code.loss_by_keyword_default,
        "by list": code.loss_by_list,
        "by cell": code.loss_by_cell(0.1),
        "by weight": code.loss_by_weight(weight),
        "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
        "module": nn.CrossEntropyLoss(label_smoothing=0.1),
        "weighted module": nn.CrossEntropyLoss(weight=weight),
        "huber module": nn.HuberLoss(),
        "smooth L1 module": nn.SmoothL1Loss(),
        "own module": code.ScaledLoss(),
        "method": code.Smoothing().loss,
    }


LOSSES = tuple(losses(loaded("user_losses")))


def middle(code: ModuleType, name: str, of_images: bool) -> nn.Module:
    """What stands between two layers."""
    norm = nn.BatchNorm2d if of_images else nn.BatchNorm1d
    if name == "BatchNorm":
        made = norm(WIDTH)
        made.num_batches_tracked += 1  # in eval() it warns of statistics that nothing wrote
        return nn.Sequential(made, nn.ReLU())
    if name == "GroupNorm":
        return nn.Sequential(nn.GroupNorm(2, WIDTH), nn.ReLU())
    if name == "Dropout":
        return nn.Sequential(nn.ReLU(), nn.Dropout(0.0))
    if name == "ListConv":
        conv = nn.Conv2d(WIDTH, WIDTH, 3)
        conv.padding = [1, 1]  # pyright: ignore[reportAttributeAccessIssue]
        return conv
    return getattr(code if name in READERS else nn, name)()


def network(code: ModuleType, name: str, first: nn.Module, second: nn.Module) -> nn.Module:
    """A small model with two layers' middles of choice."""
    if name == "vector":
        return nn.Sequential(
            nn.Linear(3, WIDTH), first, nn.Linear(WIDTH, WIDTH), second, nn.Linear(WIDTH, CLASSES)
        )
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES)
    convs = nn.Conv2d(2, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    if name == "image":
        return nn.Sequential(convs[0], first, nn.MaxPool2d(2), convs[1], second, *end)
    return nn.Sequential(code.Residual(convs[0], first, convs[1], second), *end)


class World:
    """A model, a loss, data and the modes of torch; what it changed of torch ends with it."""

    def __init__(self, network_name: str, middles: tuple[str, str], loss: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed, self.random = seed, random.Random(seed)
        self.code, self.loss_code = loaded(), loaded("user_losses")
        self.of_images = network_name != "vector"
        first, second = (middle(self.code, name, self.of_images) for name in middles)
        self.model = network(self.code, network_name, first, second).double()
        self.loss_fn, self.classifies = losses(self.loss_code)[loss], loss not in REGRESSIONS
        self.options: dict[str, Any] = {"inner_lr": 0.2, "inner_steps": 2}
        self.tasks, self.support, self.query, self.side = 2, 4, 5, 12
        self.ragged = self.probabilities = self.ignored = False
        self.in_a_tuple = self.strided = self.expanded = False
        self.grad = True
        self.torchs = contextlib.ExitStack()
        """What puts torch back."""

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.torchs.close()

    def one(self, *kinds: type[nn.Module]) -> Any:
        """A module of these classes, by chance."""
        return self.random.choice([m for m in self.model.modules() if isinstance(m, kinds)])

    def reader(self, name: str) -> Any:
        """The user's module of that class, or of what has become of it."""
        return self.one(getattr(self.code, name))

    def patch(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        """Replaces what belongs to torch."""
        if name in vars(owner):
            before = vars(owner)[name]
            self.torchs.callback(setattr, owner, name, before)
            setattr(owner, name, value)
            yield
            setattr(owner, name, before)
        else:
            self.torchs.callback(lambda: name in vars(owner) and delattr(owner, name))
            setattr(owner, name, value)
            yield
            delattr(owner, name)

    def draw(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Support and query of each task; the same numbers at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = next(self.model.parameters()).dtype
        shape = (2, self.side, self.side) if self.of_images else (3,)

        def examples(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, *shape, generator=generator, dtype=dtype)
            y = torch.randint(CLASSES, (count,), generator=generator)
            if self.probabilities or not self.classifies:
                y = torch.rand(count, CLASSES, generator=generator, dtype=dtype).softmax(-1)
            if self.ignored and not y.is_floating_point():
                y[0] = -100
            return x, y

        more = [i if self.ragged else 0 for i in range(self.tasks)]
        tasks = [(*examples(self.support + i), *examples(self.query + i)) for i in more]
        return tasks[:1] * len(tasks) if self.expanded else tasks

    def given(self, tasks: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Any, Any]:
        """The tasks as support and query of a step."""

        def inputs(x: Tensor) -> Any:
            if self.strided:
                x = x.transpose(0, -1).contiguous().transpose(0, -1)
            if self.expanded and not self.ragged:
                x = x[:1].expand(x.shape)
            return (x,) if self.in_a_tuple else x

        if self.ragged:
            return (
                [(inputs(sx), sy) for sx, sy, _, _ in tasks],
                [(inputs(qx), qy) for _, _, qx, qy in tasks],
            )
        sx, sy, qx, qy = (torch.stack(part) for part in zip(*tasks, strict=True))
        return (inputs(sx), sy), (inputs(qx), qy)

    def reference(self) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and meta-gradient of plain autograd over the very objects that a step is given."""
        options = {**self.options}
        rate, steps = options.pop("inner_lr"), options.pop("inner_steps")
        prefix = options.pop("adapt", "")
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        adapted = [name for name in names if name.startswith(prefix)]
        if not self.grad:
            return self._evaluated(rate, steps, adapted, options.get("prox", 0.0)), []
        found = oracle.maml(
            self.model, self.draw(), self.leaves(), rate=lambda _, step: rate, steps=steps,
            loss_fn=self.loss_fn, adapted=adapted, **options,
        )  # fmt: skip
        return found.loss, found.gradients

    def leaves(self) -> list[Tensor]:
        """What the meta-gradient is taken of."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self) -> tuple[Tensor, list[Tensor | None], str]:
        """Loss and meta-gradient by fastmeta, and what computed them."""
        with torch.set_grad_enabled(self.grad):
            out = fastmeta.maml_step(
                self.model, *self.given(self.draw()), loss_fn=self.loss_fn, **self.options
            )
        leaves = self.leaves() if self.grad else []
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True) if leaves else ()
        return out.loss.detach(), [*gradients], out.executor

    def _evaluated(self, rate: float, steps: int, adapted: list[str], prox: float) -> Tensor:
        """The loss where a caller has turned gradients off: on for the inner loop alone."""
        losses: list[Tensor] = []
        for sx, sy, qx, qy in self.draw():
            start = phi = dict(self.model.named_parameters())
            for _ in range(steps):
                with torch.enable_grad():
                    phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
                    loss = self.loss_fn(oracle.call(self.model, phi, sx), sy)
                    slopes = torch.autograd.grad(
                        loss, [phi[name] for name in adapted], allow_unused=True
                    )
                moves = dict(zip(adapted, slopes, strict=True))
                phi |= {
                    n: phi[n] - rate * (g + prox * (phi[n] - start[n]))
                    for n, g in moves.items()
                    if g is not None
                }
            with torch.no_grad():
                losses.append(self.loss_fn(oracle.call(self.model, phi, qx), qy))
        return torch.stack(losses).mean()
