"""The reversible inner loop beside the one that keeps its weights: errors, time, storage.

python -m bench.reversible              both tables
python -m bench.reversible --errors     errors of the meta-gradient at K = 20
python -m bench.reversible --times      the C++ call alone, float32, one thread, and its storage
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from bench import engines, measure

MEMORIES = ("saved", "reversible")
TASKS, SUPPORT, QUERY, STEPS = 8, 10, 15, 20


@dataclass(frozen=True)
class Problem:
    """A network with rates at which it learns slowly, well, and too fast."""

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    norm: bool = False
    prox: float = 0.0

    def model(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            layers.append(nn.Linear(inputs, outputs))
            if self.norm:
                layers.append(nn.BatchNorm1d(outputs, track_running_stats=False))
            layers.append(self.activation())
        return nn.Sequential(*layers[: -2 if self.norm else -1]).double()

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """Sinusoids of [-5, 5], or points with labels that a linear map gives them."""
        if self.widths[0] == 1:
            x = 10 * torch.rand(TASKS, count, 1).double() - 5
            return x, torch.sin(x + 3 * torch.arange(TASKS).view(-1, 1, 1))
        torch.manual_seed(1)
        of_task = torch.randn(TASKS, self.widths[0], self.widths[-1]).double()
        x = torch.randn(TASKS, count, self.widths[0]).double()
        return x, (x @ of_task).argmax(-1)


PROBLEMS = (
    Problem("1-40-40-1 relu", (1, 40, 40, 1), nn.ReLU),
    Problem("20-64-64-5 tanh", (20, 64, 64, 5), nn.Tanh),
    Problem("20-64-64-5 tanh, batch norm", (20, 64, 64, 5), nn.Tanh, norm=True),
    Problem("20-64-64-5 tanh, prox=0.5", (20, 64, 64, 5), nn.Tanh, prox=0.5),
)
RATES = (0.001, 0.01, 0.1, 0.3)


def gradient(problem: Problem, rate: float, dtype: torch.dtype, executor: str) -> Tensor:
    """The whole meta-gradient as one row, in float64."""
    torch.manual_seed(0)
    model = problem.model().to(dtype)
    support, query = (
        tuple(t.to(dtype) if t.is_floating_point() else t for t in problem.examples(count))
        for count in (SUPPORT, QUERY)
    )
    out = fastmeta.maml_step(
        model, support, query, inner_lr=rate, inner_steps=STEPS, prox=problem.prox,
        loss_fn=F.mse_loss if problem.widths[-1] == 1 else F.cross_entropy, executor=executor,
    )  # fmt: skip
    found = torch.autograd.grad(out.loss, list(model.parameters()))
    return torch.cat([g.double().flatten() for g in found])


def errors(problem: Problem, rate: float) -> list[float]:
    """Of autograd in float32, then of both loops in float32 and float64, against autograd."""
    exact = gradient(problem, rate, torch.float64, "generic")
    found = [gradient(problem, rate, torch.float32, "generic")]
    for dtype in (torch.float32, torch.float64):
        for memory in MEMORIES:
            os.environ["FASTMETA_MEMORY"] = memory
            found.append(gradient(problem, rate, dtype, "fused"))
    return [float((g - exact).norm() / exact.norm()) for g in found]


def print_errors() -> None:
    print("| network | inner_lr | autograd, float32 | saved, float32 | reversible, float32 "
          "| saved, float64 | reversible, float64 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for problem in PROBLEMS:
        for rate in RATES:
            cells = " | ".join(f"{error:.1e}" for error in errors(problem, rate))
            print(f"| {problem.name} | {rate} | {cells} |", flush=True)


def cases() -> Iterator[engines.Case]:
    for tasks in (1, 25, 1000):
        for steps in (5, 20):
            yield engines.Case("1-40-40-1", (1, 40, 40, 1), tasks, 10, 10, steps)
    for count in (5, 10, 30):
        yield engines.Case("20-64-64-5", (20, 64, 64, 5), 64, count, count, 40)
    for steps in (5, 20):
        yield engines.Case("784-128-128-10", (784, 128, 128, 10), 4, 50, 150, steps)
    for width in (128, 256, 384, 512, 768):
        for count, steps in ((5, 5), (5, 20), (15, 20), (50, 20)):
            name = f"{width}-{width}-{width}-10"
            yield engines.Case(name, (width, width, width, 10), 4, count, count, steps)


def print_times(seconds: float) -> None:
    print("| network | N | T | K | engine | saved, ms | reversible, ms | ratio | saved, kB "
          "| reversible, kB | taken |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in cases():
        kernels: dict[str, Any] = {m: engines.kernel(case, "", memory=m) for m in MEMORIES}
        runs = {m: engines.call(case, "", memory=m) for m in MEMORIES}
        times = measure.interleaved(runs, seconds, 9, time.thread_time)
        bytes_ = " | ".join(f"{kernels[m].storage_bytes / 1e3:,.0f}" for m in MEMORIES)
        print(
            f"| {case.name} | {case.support} | {case.tasks} | {case.steps} "
            f"| {kernels['saved'].engine} | {times['saved']:.3f} | {times['reversible']:.3f} "
            f"| {times['reversible'] / times['saved']:.2f} | {bytes_} "
            f"| {engines.kernel(case, '').memory} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.errors or not arguments.times:
        print_errors()
    if arguments.times or not arguments.errors:
        print_times(arguments.seconds)


if __name__ == "__main__":
    main()
