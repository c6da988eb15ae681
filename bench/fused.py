"""The fused CPU step against the plain loop, whole calls, one thread.

python -m bench.fused
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastmeta
from bench import loops, measure
from bench.workloads import WORKLOADS, Pair, Workload


def fused(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Tensor:
    """One whole meta-step by the fused kernels."""
    out = fastmeta.maml_step(
        model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
        loss_fn=workload.loss_fn, executor="fused",
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach()


def plain(workload: Workload, model: nn.Module, support: Pair, query: Pair) -> Tensor:
    """The same by the plain loop."""
    return loops.backward_at_end(
        model, support, query, workload.loss_fn, workload.steps, workload.inner_lr
    )


def check(workload: Workload) -> None:
    """Refuses to time what does not agree with float64 autograd."""
    gradients: list[Tensor] = []
    for step in (fused, plain):
        model, support, query = workload.make(dtype=torch.float64)
        step(workload, model, support, query)
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    if (gradients[0] - gradients[1]).norm() > 1e-9 * gradients[1].norm():
        raise SystemExit(f"{workload.name}: the fused step disagrees with autograd; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per workload")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
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
