"""The two engines of the fused CPU step side by side: the C++ call alone, one thread.

Second order, float32; the pairs of figures are tasks / features. FASTMETA_ISA and
FASTMETA_FORM are heeded; without the latter the first layer is in primal form, whose arithmetic is
what the figures count.

python -m bench.engines
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import measure, operations
from fastmeta.executors.fused.lowering import NONE

extension: Any = importlib.import_module("fastmeta._C")

RELU, CROSS_ENTROPY, MSE = 1, 0, 1
TENSORS = [True, True, False, False]
FORM = os.environ.get("FASTMETA_FORM", "primal")


@dataclass(frozen=True)
class Case:
    """An MLP with ReLU and a second-order step."""

    name: str
    widths: tuple[int, ...]
    tasks: int
    support: int
    query: int
    steps: int = 5
    body: int = 0
    """Layers in front that do not adapt."""
    per_step: bool = False
    """True where each inner step has a support set of its own."""

    @property
    def loss(self) -> int:
        return MSE if self.widths[-1] == 1 else CROSS_ENTROPY

    def flops(self) -> float:
        """Exact arithmetic of the matrix products, in primal form."""
        return operations.of_step(
            self.widths, self.tasks, self.support, self.query, self.steps, body=self.body
        )


def cases() -> Iterator[Case]:
    for tasks in (1, 4, 25, 1000):
        yield Case("W1b", (1, 40, 40, 1), tasks, 10, 10)
    for tasks in (1, 4, 32):
        yield Case("W3", (784, 128, 128, 10), tasks, 50, 150)
    for tasks in (1, 4, 32):
        yield Case("W3 after its first layer", (128, 128, 10), tasks, 50, 150)
    for widths, tasks, support, query in (
        ((1, 40, 40, 1), 25, 10, 10),
        ((784, 64, 64, 10), 32, 50, 150),
        ((784, 64, 64, 10), 32, 10, 30),
    ):
        name = "-".join(map(str, widths))
        yield Case(f"{name}, last layer adapts", widths, tasks, support, query, body=2)
    for width in (16, 32, 64, 128, 256, 512):
        for tasks in (1, 4, 16):
            yield Case(f"{width} wide", (width, width, width, 10), tasks, 50, 50, 2)


def kernel(case: Case, engine: str, form: str = FORM, memory: str = "") -> Any:
    """The step's kernel; what the kernels choose themselves where a name is empty."""
    pairs = list(itertools.pairwise(case.widths))
    layers = [
        (
            i, o, RELU if at < len(pairs) - 1 else 0, 0.0, 0.0, 0, 0.0,
            TENSORS, TENSORS if at >= case.body else [False] * len(TENSORS),
            (at - 1, NONE, False),
        )
        for at, (i, o) in enumerate(pairs)
    ]  # fmt: skip
    return extension.FusedStep(
        layers, case.loss, 0.0, -100, False, case.support, case.query, case.steps,
        True, False, False, False, 0.0, False, case.tasks, os.environ.get("FASTMETA_ISA", ""),
        engine, form, memory, per_step_support=case.per_step,
    )  # fmt: skip


def call(case: Case, engine: str, form: str = FORM, memory: str = "") -> Callable[[], Tensor]:
    """A function that runs the C++ call and returns the meta-gradient."""
    torch.manual_seed(0)
    step, pairs = kernel(case, engine, form, memory), list(itertools.pairwise(case.widths))
    parameters = [
        t for i, o in pairs for t in (torch.randn(o, i) / i**0.5, torch.zeros(o), None, None)
    ]

    # Inputs, targets, labels, example weights and the loss's weights.
    def examples(*count: int) -> list[Tensor | None]:
        x = torch.randn(case.tasks, *count, case.widths[0])
        if case.loss == MSE:
            return [x, torch.randn(case.tasks, *count, 1), None, None, None]
        return [x, None, torch.randint(case.widths[-1], (case.tasks, *count)), None, None]

    sets = (case.steps,) if case.per_step else ()
    support, query = examples(*sets, case.support), examples(case.query)
    rates = torch.full((case.steps, len(TENSORS) * len(pairs)), 0.01)
    weights = torch.full((case.tasks,), 1 / case.tasks)
    losses = [torch.zeros(case.steps + 1, case.tasks) for _ in range(2)]
    outputs = torch.empty(case.tasks, case.query, case.widths[-1])
    gradient = torch.empty(step.gradients)

    def address(tensors: list[Tensor] | list[Tensor | None]) -> list[int]:
        return [0 if t is None else t.data_ptr() for t in tensors]

    arguments = (
        case.tasks, address(parameters), [], [0] * 2 * len(pairs), rates.data_ptr(),
        [0.0] * case.steps + [1.0], [False] * case.steps + [True], weights.data_ptr(),
        address(support), address(query),
        losses[0].data_ptr(), losses[1].data_ptr(), outputs.data_ptr(), gradient.data_ptr(), 1,
    )  # fmt: skip

    def run() -> Tensor:
        # What the addresses belong to has to live as long as this function.
        _ = parameters, support, query, rates, weights, losses, outputs
        step.run(*arguments)
        return gradient

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case and engine")
    parser.add_argument("--only", default="", help="cases whose name has this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    a, b, out = (torch.randn(512, 512) for _ in range(3))
    print("| case | T | tasks, ms | features, ms | GFLOP/s | of torch.mm | taken |")
    print("|---|---|---|---|---|---|---|")
    for case in cases():
        if arguments.only not in case.name:
            continue
        runs = {name: call(case, name) for name in ("tasks", "features")}
        gradients = [run().clone() for run in runs.values()]
        if (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm():
            raise SystemExit(f"{case.name}: the engines disagree; not timed")
        # One after the other, because they would empty each other's caches; in the thread's own
        # time, so that others on this core do not count.
        functions = {**runs, "mm": lambda: torch.mm(a, b, out=out)}
        times: dict[str, float] = {}
        for name, run in functions.items():
            times |= measure.interleaved({name: run}, arguments.seconds, 3, time.thread_time)
        peak = 2 * 512**3 / times.pop("mm")
        rates = [case.flops() / each for each in times.values()]
        print(
            f"| {case.name} | {case.tasks} | {times['tasks']:.3f} | {times['features']:.3f} | "
            + " / ".join(f"{rate / 1e6:.0f}" for rate in rates)
            + " | "
            + " / ".join(f"{rate / peak:.2f}" for rate in rates)
            + f" | {kernel(case, '').engine} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
