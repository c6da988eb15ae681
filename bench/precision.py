"""The float32 error of the meta-gradient: every executor beside the plain loop.

python -m bench.precision                    all networks, as a table
python -m bench.precision --only blank,ELU   those whose names have a part of these
python -m bench.precision --seeds 31         more draws of weights and data

The networks are those on which normalisation loses digits: a channel's mean is large beside its
deviation, most of an image is background, activations and pooling have corners. The reference is
the plain loop's meta-gradient in float64, the error the norm of the difference relative to it.
Rounding may turn a corner: another side of a ReLU, another pixel of a pooling window. The error of
that draw then jumps to 1e-4 or 1e-2, in the plain loop too, and which draws it hits is chance.
So medians over the same draws are compared.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from bench import loops
from bench.executors import rules_alone
from bench.residual import resnet12
from bench.workloads import Pair, StridedConv4, conv4

LOOP, RULES, COMPILED = "plain loop", "layers' rules", "compiled"
EXECUTORS = {"generic": ("generic",), RULES: ("layered",), COMPILED: ("layered", "fused")}
"""The executor asked for; `RULES` is the layered executor kept from the compiled step."""
MOST = 3.0
"""The largest median error, in multiples of the plain loop's."""


@dataclass(frozen=True)
class Case:
    """A network, what its images are, and the inner loop."""

    network: Callable[[], nn.Module]
    images: Callable[[int], Tensor]
    """From how many: `[count, C, H, W]`, or rows."""
    inner_lr: float = 0.1
    steps: int = 2
    tasks: int = 2
    support: int = 5
    query: int = 15
    classes: int = 5

    def make(self, seed: int) -> tuple[nn.Module, Pair, Pair]:
        torch.manual_seed(seed)
        model = self.network()

        def examples(count: int) -> Pair:
            x = self.images(self.tasks * count).unflatten(0, (self.tasks, count))
            return x, torch.arange(count).remainder(self.classes).expand(self.tasks, count)

        return model, examples(self.support), examples(self.query)


def strokes(count: int, channels: int = 1, side: int = 28) -> Tensor:
    """Three thin lines of 1 on a background of 0, with soft edges, like Omniglot's characters."""
    ends = side * (0.15 + 0.7 * torch.rand(count, 3, 2, 2))  # [images, lines, ends, xy]
    along = torch.linspace(0, 1, side).view(1, 1, -1, 1)
    points = (ends[:, :, :1] * (1 - along) + ends[:, :, 1:] * along).flatten(1, 2)
    grid = torch.cartesian_prod(*2 * [torch.arange(float(side))])
    apart = torch.cdist(grid.expand(count, -1, -1), points).amin(2)
    image = (1.8 - apart).clamp(0, 1).view(count, 1, side, side)
    return image * (0.5 + 0.5 * torch.rand(count, channels, 1, 1)) if channels > 1 else image


def noise(level: float, channels: int = 1, side: int = 16) -> Callable[[int], Tensor]:
    """Pixels of deviation 1 about one level."""
    return lambda count: level + torch.randn(count, channels, side, side)


def blocks(
    activation: Callable[[], nn.Module], *filters: int, channels: int = 1, side: int = 28,
    bias: float = 0.0, pool: Callable[[int], nn.Module] = nn.MaxPool2d, norm: str = "batch",
) -> nn.Sequential:  # fmt: skip
    """Blocks of convolution, norm, activation and pooling, and a linear head."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((channels, *filters), filters, strict=False):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        if bias:
            nn.init.constant_(conv.bias, bias)  # pyright: ignore[reportArgumentType]
        layers += [conv, nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(4, outputs)]
        layers += [activation(), pool(2)]
        side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters[-1] * side**2, 5))


def separable() -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.SiLU(),
        ]  # fmt: skip

    layers = [*block(3, 16), *block(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def strided(activation: Callable[[], nn.Module], bias: float = 0.0) -> nn.Module:
    model = StridedConv4(filters=32)
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.ReLU):
            model.features[i] = activation()
        if isinstance(layer, nn.Conv2d) and bias:
            nn.init.constant_(layer.bias, bias)  # pyright: ignore[reportArgumentType]
    return model


def dense(activation: Callable[[], nn.Module], bias: float) -> nn.Sequential:
    """Linear layers with batch norm over the examples."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((64, 48), (48, 48)):
        linear = nn.Linear(inputs, outputs)
        nn.init.constant_(linear.bias, bias)
        layers += [linear, nn.BatchNorm1d(outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(48, 5))


CASES = {
    "bias 30, tanh": Case(lambda: blocks(nn.Tanh, 16, 16, bias=30, side=16), noise(0)),
    "bias 30, ReLU": Case(lambda: blocks(nn.ReLU, 16, 16, bias=30, side=16), noise(0)),
    "blank, tanh, max pool": Case(lambda: blocks(nn.Tanh, 16, 16, 16), strokes),
    "blank, ReLU, max pool": Case(lambda: blocks(nn.ReLU, 16, 16, 16), strokes),
    "blank, conv4, K=5, rate 0.4": Case(
        lambda: conv4(1, 32, 28, 5), strokes, inner_lr=0.4, steps=5
    ),
    "blank, conv4": Case(lambda: conv4(1, 64, 28, 5), strokes, steps=1, inner_lr=0.01),
    "blank, strided, ReLU, K=5": Case(lambda: strided(nn.ReLU), strokes, 0.4, 5),
    "bias 30, strided, SiLU": Case(lambda: strided(nn.SiLU, 30.0), strokes, 0.4, 2),
    "level 100, ELU": Case(lambda: blocks(nn.ELU, 16, 16, side=16), noise(100)),
    "level 100, ReLU": Case(lambda: blocks(nn.ReLU, 16, 16, side=16), noise(100)),
    "level 100, average pool": Case(
        lambda: blocks(nn.Softplus, 16, 16, channels=3, side=16, pool=nn.AvgPool2d),
        noise(100, 3),
    ),
    "blank, ResNet": Case(lambda: resnet12(8, 16), lambda count: strokes(count, 3, 16), query=10),
    "blank, separable": Case(separable, lambda count: strokes(count, 3, 32)),
    "bias 30, group norm": Case(
        lambda: blocks(nn.ELU, 16, 16, bias=30, side=16, norm="group"), noise(0)
    ),
    "bias 30, dense": Case(lambda: dense(nn.Tanh, 30.0), lambda count: torch.randn(count, 64)),
    "blank, dense": Case(
        lambda: dense(nn.ReLU, 0.0), lambda count: strokes(count, 1, 8).flatten(1)
    ),
}


def gradient(case: Case, contender: str, model: nn.Module, data: list[Pair]) -> Tensor | None:
    """The meta-gradient as one vector in float64; None where the contender does not serve."""
    model = copy.deepcopy(model)
    if contender == LOOP:
        loops.backward_per_task(model, *data, F.cross_entropy, case.steps, case.inner_lr)
    elif not step(case, contender, model, data):
        return None
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten().double() for part in parts])


def step(case: Case, contender: str, model: nn.Module, data: list[Pair]) -> bool:
    """A meta-step, its gradient left in `.grad`; False where the contender does not serve."""
    for executor in EXECUTORS[contender]:
        with rules_alone() if contender == RULES else nullcontext():
            try:
                out = fastmeta.maml_step(
                    model, *data, inner_lr=case.inner_lr, inner_steps=case.steps, executor=executor
                )
            except ValueError:  # the executor declines this network
                continue
        if contender != COMPILED or out.executor in ("layered-cpu", "fused-cpu"):
            out.loss.backward()
            return True
    return False


def errors(case: Case, seeds: int) -> dict[str, list[float]]:
    """Over the draws, of each contender that serves."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        model, *data = case.make(seed)
        wide = [(x.double(), y) for x, y in data]
        exact = gradient(case, LOOP, copy.deepcopy(model).double(), wide)
        assert exact is not None
        for contender in (LOOP, *EXECUTORS):
            ours = gradient(case, contender, model, data)
            if ours is not None:
                error = float((ours - exact).norm() / exact.norm())
                found.setdefault(contender, []).append(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="parts of networks' names, comma-separated")
    parser.add_argument("--seeds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Medians over {args.seeds} draws (the largest), and times the plain loop's median.\n")
    print("| network | " + " | ".join((LOOP, *EXECUTORS)) + " |\n|---|---|---|---|---|")
    worst = 0.0
    for name, case in CASES.items():
        if args.only and not any(part in name for part in args.only.split(",")):
            continue
        found = errors(case, args.seeds)
        cells: list[str] = []
        for contender in (LOOP, *EXECUTORS):
            if contender not in found:
                cells.append("-")
                continue
            ratio = median(found[contender]) / median(found[LOOP])
            worst = max(worst, ratio)
            cell = f"{median(found[contender]):.1e} ({max(found[contender]):.0e})"
            cells.append(cell if contender == LOOP else f"{cell}, {ratio:.1f}x")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nAt most {worst:.1f} times the plain loop's error; {MOST:.0f} is allowed.")


if __name__ == "__main__":
    main()
