"""The general path against the plain autograd loop: time and peak memory.

python -m bench.general                 both tables
python -m bench.general --only W1,W5    of some workloads
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastmeta
from bench import loops, measure
from bench.workloads import WORKLOADS, Pair, Workload

STEPS = (1, 5, 10)
MEMORY_OF = ("W1", "W2", "W3", "W4", "W5", "W5s", "W6")
LOOPS = ("loop, backward at end", "loop, backward per task")
GENERAL = 'fastmeta, executor="generic"'
CONTENDERS = (*LOOPS, GENERAL, "fastmeta")
MEMORY_CONTENDERS = (*LOOPS, "fastmeta", 'fastmeta, memory="low"', "torch.func vmap")


def step_function(
    contender: str, workload: Workload, model: nn.Module, support: Pair, query: Pair
) -> Callable[[], Tensor]:
    """One whole meta-step: loss, and meta-gradient in `.grad`."""
    loss_fn, steps, rate = workload.loss_fn, workload.steps, workload.inner_lr
    if contender == "loop, backward at end":
        return lambda: loops.backward_at_end(model, support, query, loss_fn, steps, rate)
    if contender == "loop, backward per task":
        return lambda: loops.backward_per_task(model, support, query, loss_fn, steps, rate)
    if contender == "torch.func vmap":
        return lambda: _functional(workload, model, support, query)
    choices = {
        "loss_fn": loss_fn,
        "memory": "low" if "low" in contender else "auto",
        "executor": "generic" if contender == GENERAL else "auto",
    }

    def step() -> Tensor:
        out = fastmeta.maml_step(model, support, query, inner_lr=rate, inner_steps=steps, **choices)
        out.loss.backward()
        return out.loss.detach()

    return step


def _functional(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Tensor:
    """`vmap` over all tasks of `grad` through the inner loop, by hand."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return workload.loss_fn(functional_call(model, parameters, (x,)), y)

    def task(theta: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor):
        phi = theta
        for _ in range(workload.steps):
            gradients = grad(loss)(phi, sx, sy)
            phi = {name: p - workload.inner_lr * gradients[name] for name, p in phi.items()}
        value = loss(phi, qx, qy)
        return value, value

    theta = {name: p.detach() for name, p in model.named_parameters()}
    gradients, losses = vmap(grad(task, has_aux=True), (None, 0, 0, 0, 0))(theta, *support, *query)
    for name, p in model.named_parameters():
        p.grad = gradients[name].mean(0)
    return losses.mean()


def check(workload: Workload) -> None:
    """Refuses to time what does not agree with float64 autograd."""
    model, support, query = workload.make(dtype=torch.float64)
    reference: list[Tensor] = []
    for contender in dict.fromkeys((*CONTENDERS, *MEMORY_CONTENDERS)):
        model.zero_grad()
        step_function(contender, workload, model, support, query)()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        reference = reference or gradients
        apart = sum(
            float((a - b).square().sum()) for a, b in zip(gradients, reference, strict=True)
        )
        scale = sum(float(b.square().sum()) for b in reference)
        if apart > 1e-18 * scale:
            raise SystemExit(f"{workload.name}: {contender} disagrees with autograd; not timed")


def time_row(name: str, seconds: float) -> dict[str, float]:
    workload = WORKLOADS[name]
    check(workload if workload.tasks <= 100 else workload.with_tasks(50))
    model, support, query = workload.make()
    return measure.interleaved(
        {c: step_function(c, workload, model, support, query) for c in CONTENDERS}, seconds
    )


def memory_row(name: str, steps: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for contender in MEMORY_CONTENDERS:
        result = measure.in_fresh_process(
            "bench.general", "--memory-of", name, "--steps", str(steps), "--contender", contender
        )
        row[contender] = result["megabytes"]
    return row


def _print_times(times: dict[str, dict[str, float]]) -> None:
    print("\n| workload | at end, ms | per task, ms | general path, ms | as chosen, ms "
          "| general path / faster loop | as chosen / faster loop |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for name, row in times.items():
        faster = min(row[loop] for loop in LOOPS)
        cells = [f"{row[c]:.{1 if row[c] >= 10 else 2}f}" for c in CONTENDERS]
        ratios = [f"{row[c] / faster:.3f}" for c in (GENERAL, "fastmeta")]
        print(f"| {name} | " + " | ".join((*cells, *ratios)) + " |")


def _print_memory(memory: dict[str, dict[str, float]]) -> None:
    print("\n| workload, K | " + " | ".join(f"{c}, MB" for c in MEMORY_CONTENDERS) + " |")
    print("|---" * (len(MEMORY_CONTENDERS) + 1) + "|")
    for name, row in memory.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.0f}" for c in MEMORY_CONTENDERS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="workloads, comma-separated")
    parser.add_argument("--seconds", type=float, default=10.0, help="per workload")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        workload = WORKLOADS[args.memory_of].with_steps(args.steps)
        step = step_function(args.contender, workload, *workload.make())
        print(json.dumps({"megabytes": measure.peak_above_start(step)}))
        return
    names = args.only.split(",") if args.only else list(WORKLOADS)
    print(f"torch {torch.__version__}, one thread, {platform.machine()}, {_processor()}")
    times = {name: time_row(name, args.seconds) for name in names}
    _print_times(times)
    memory: dict[str, dict[str, float]] = {}
    if not args.no_memory:
        memory = {
            f"{name}, K={steps}": memory_row(name, steps)
            for name in MEMORY_OF
            if name in names
            for steps in STEPS
        }
        _print_memory(memory)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"torch": torch.__version__, "processor": _processor()}
        args.output.write_text(
            json.dumps({**figures, "milliseconds": times, "megabytes": memory}, indent=1) + "\n"
        )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
