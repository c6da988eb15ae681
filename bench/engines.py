"""The two engines of the fused CPU step side by side: the C++ call alone, one thread.

python -m bench.engines
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import measure

extension: Any = __import__("fastmeta._C", fromlist=["FusedStep"])

RELU, CROSS_ENTROPY, MSE = 1, 0, 1
TENSORS = [True, True, False, False]


@dataclass(frozen=True)
class Case:
    """An MLP with ReLU and a second-order step."""

    name: str
    widths: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int = 5

    @property
    def loss(self) -> int:
        return MSE if self.widths[-1] == 1 else CROSS_ENTROPY

    def flops(self) -> float:
        """Exact arithmetic of the matrix products."""
        total = 0
        for i, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            # The first layer's input is data: no gradient and no tangent of it.
            step, query = (4, 2) if i == 0 else (9, 3)
            each = self.steps * step * self.support + query * self.query
            total += 2 * inputs * outputs * each
        return total * self.tasks


def cases() -> Iterator[Case]:
    for tasks in (1, 4, 25, 1000):
        yield Case("W1b", (1, 40, 40, 1), tasks, 10, 10)
    for tasks in (1, 4, 32):
        yield Case("W3", (784, 128, 128, 10), tasks, 50, 150)
    for tasks in (1, 4, 32):
        yield Case("W3 after its first layer", (128, 128, 10), tasks, 50, 150)
    for width in (16, 32, 64, 128, 256, 512):
        for tasks in (1, 4, 16):
            yield Case(f"{width} wide", (width, width, width, 10), tasks, 50, 50, 2)


def call(case: Case, engine: str) -> Callable[[], Tensor]:
    """A function that runs the C++ call and returns the meta-gradient."""
    torch.manual_seed(0)
    pairs = list(zip(case.widths, case.widths[1:], strict=False))
    layers = [
        (i, o, RELU if at < len(pairs) - 1 else 0, 0.0, 0.0, 0, 0.0, TENSORS, TENSORS)
        for at, (i, o) in enumerate(pairs)
    ]
    step = extension.FusedStep(
        layers, case.loss, 0.0, -100, False, case.support, case.query, case.steps, True, False, False,
        False, 0.0, False, case.tasks, "", engine,
    )  # fmt: skip
    parameters = [
        t for i, o in pairs for t in (torch.randn(o, i) / i**0.5, torch.zeros(o), None, None)
    ]

    # Inputs, targets, labels, example weights and the loss's weights.
    def examples(count: int) -> list[Tensor | None]:
        x = torch.randn(case.tasks, count, case.widths[0])
        if case.loss == MSE:
            return [x, torch.randn(case.tasks, count, 1), None, None, None]
        return [x, None, torch.randint(case.widths[-1], (case.tasks, count)), None, None]

    support, query = examples(case.support), examples(case.query)
    rates = torch.full((case.steps, len(TENSORS) * len(pairs)), 0.01)
    weights = torch.full((case.tasks,), 1 / case.tasks)
    losses = [torch.zeros(case.steps + 1, case.tasks) for _ in range(2)]
    outputs = torch.empty(case.tasks, case.query, case.widths[-1])
    gradient = torch.empty(step.gradients)

    def address(tensors: list[Tensor] | list[Tensor | None]) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in tensors]

    arguments = (
        case.tasks, address(parameters), [], [0] * 2 * len(pairs), rates.data_ptr(), [0.0] * case.steps + [1.0],
        [False] * case.steps + [True], weights.data_ptr(), address(support), address(query),
        losses[0].data_ptr(), losses[1].data_ptr(), outputs.data_ptr(), gradient.data_ptr(), 1,
    )  # fmt: skip

    def run() -> Tensor:
        # What the addresses belong to has to live as long as this function.
        _ = parameters, support, query, rates, weights, losses, outputs
        step.run(*arguments)
        return gradient

    return run


def sgemm_gflops() -> float:
    """The core's own rate: torch.mm of 512 x 512 matrices."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    out = torch.empty(512, 512)
    times = measure.interleaved({"mm": lambda: torch.mm(a, b, out=out)}, 0.5)
    return 2 * 512**3 / times["mm"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--only", default="", help="cases whose name has this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peak = sgemm_gflops()
    print(f"sgemm: {peak:.0f} GFLOP/s")
    print("| case | T | tasks, ms | features, ms | GFLOP/s | of sgemm | taken |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        if arguments.only not in case.name:
            continue
        runs = {name: call(case, name) for name in ("tasks", "features")}
        gradients = [run().clone() for run in runs.values()]
        if (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm():
            raise SystemExit(f"{case.name}: the engines disagree; not timed")
        times = measure.interleaved(runs, arguments.seconds, least=3)
        rates = {name: case.flops() / time / 1e6 for name, time in times.items()}
        taken = "features"
        print(
            f"| {case.name} | {case.tasks} | {times['tasks']:.3f} | {times['features']:.3f} | "
            + " / ".join(f"{rate:.0f}" for rate in rates.values())
            + " | "
            + " / ".join(f"{rate / peak:.2f}" for rate in rates.values())
            + f" | {taken} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
