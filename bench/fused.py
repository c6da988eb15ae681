"""The fused CPU step against the plain loop, whole calls, one thread.

python -m bench.fused
python -m bench.fused --anil   where only the last layer adapts, against all layers
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastmeta
from bench import loops, measure
from bench.workloads import WORKLOADS, Pair, Workload, mlp

Step = Callable[[Workload, nn.Module, Pair, Pair], Tensor]
ANIL = (
    Workload("1-40-40-1", lambda: mlp(1, 40, 40, 1), None, (1,), 25, 10, 10, 5),
    Workload("784-64-64-10", lambda: mlp(784, 64, 64, 10), 10, (784,), 32, 50, 150, 5),
    Workload("784-64-64-10", lambda: mlp(784, 64, 64, 10), 10, (784,), 32, 10, 30, 5),
)


def fused(
    workload: Workload, model: nn.Module, support: Pair, query: Pair,
    adapt: list[str] | None = None, executor: str = "fused",
) -> Tensor:  # fmt: skip
    """One whole meta-step by the fused kernels."""
    out = fastmeta.maml_step(
        model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
        loss_fn=workload.loss_fn, adapt=adapt, executor=executor,
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach()


def last_layer(
    workload: Workload, model: nn.Module, support: Pair, query: Pair, executor: str = "fused"
) -> Tensor:
    """The same where nothing but the last layer adapts."""
    names = [name for name, _ in model.named_parameters()]
    return fused(workload, model, support, query, names[-2:], executor)


def plain(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Tensor:
    """One whole meta-step by the plain loop."""
    return loops.backward_at_end(
        model, support, query, workload.loss_fn, workload.steps, workload.inner_lr
    )


def check(workload: Workload, ours: Step = fused, theirs: Step = plain) -> None:
    """Refuses to time what does not agree with float64 autograd."""
    gradients: list[Tensor] = []
    for step in (ours, theirs):
        model, support, query = workload.make(dtype=torch.float64)
        step(workload, model, support, query)
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    if (gradients[0] - gradients[1]).norm() > 1e-9 * gradients[1].norm():
        raise SystemExit(f"{workload.name}: the fused step disagrees with autograd; not timed")


def anil(seconds: float) -> None:
    """Prints what a step takes where only the last layer adapts."""
    print("| network | T | N | Q | K | all adapt, ms | last layer adapts, ms |")
    print("|---|---|---|---|---|---|---|")
    for workload in ANIL:
        check(workload, last_layer, functools.partial(last_layer, executor="generic"))
        data = workload.make()
        times = measure.interleaved(
            {
                "all": lambda: fused(workload, *data),  # noqa: B023
                "last": lambda: last_layer(workload, *data),  # noqa: B023
            },
            seconds,
            clock=time.thread_time,  # so that others on this core do not count
        )
        sizes = f"{workload.tasks} | {workload.support} | {workload.query} | {workload.steps}"
        print(f"| {workload.name} | {sizes} | {times['all']:.3f} | {times['last']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per workload")
    parser.add_argument("--anil", action="store_true", help="only the last layer adapts")
    arguments = parser.parse_args()
    seconds = arguments.seconds
    torch.set_num_threads(1)
    if arguments.anil:
        anil(seconds)
        return
    print("| workload | plain loop, ms | fused, ms | plain loop / fused |")
    print("|---|---|---|---|")
    for name in ("W1", "W1b", "W1c", "W2", "W2b", "W3", "W4"):
        workload = WORKLOADS[name]
        check(workload if workload.tasks <= 100 else workload.with_tasks(50))
        data = workload.make()
        times = measure.interleaved(
            {
                "plain": lambda: plain(workload, *data),  # noqa: B023
                "fused": lambda: fused(workload, *data),  # noqa: B023
            },
            seconds,
        )
        ratio = times["plain"] / times["fused"]
        print(f"| {name} | {times['plain']:.2f} | {times['fused']:.2f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
