"""Loop or vmap: both measured on a grid of problems, beside what the cost model picks.

python -m bench.crossover
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from bench import measure
from bench.workloads import WORKLOADS, StridedConv4, Workload, conv4, mlp
from fastmeta.arguments import plan_step
from fastmeta.executors import generic
from fastmeta.plan import cost
from fastmeta.plan.snapshot import snapshot


def grid() -> list[Workload]:
    """From tiny to wide, few tasks to many; and convolutions."""
    base = WORKLOADS["W2"]
    rows: list[Workload] = []
    for width, tasks, steps in [
        (16, 2, 1), (16, 4, 5), (16, 32, 1), (64, 2, 1), (64, 4, 5), (64, 32, 1), (64, 32, 5),
        (256, 4, 1), (256, 32, 1), (512, 4, 5), (512, 16, 1),
    ]:  # fmt: skip
        for inputs in (32, 784):
            name = f"mlp {inputs}-{width}-{width}-10, T={tasks}, K={steps}"
            network = lambda inputs=inputs, width=width: mlp(inputs, width, width, 10)  # noqa: E731
            rows.append(
                replace(base, name=name, network=network, shape=(inputs,), tasks=tasks, steps=steps,
                        query=50)
            )  # fmt: skip
    image = WORKLOADS["W5"]
    rows += [
        replace(image, name="conv4 8 filters, T=8", network=lambda: conv4(1, 8, 28, 5), tasks=8),
        replace(image, name="conv4 32 filters, T=4", network=lambda: conv4(1, 32, 28, 5)),
        replace(image, name="strided conv4, 16 filters, T=32", tasks=32, query=5,
                network=lambda: StridedConv4(5, 16)),
    ]  # fmt: skip
    return [WORKLOADS[name] for name in ("W1", "W1b", "W2", "W2b", "W3", "W4", "W5s")] + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--chunks", action="store_true", help="also vmap in smaller chunks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | loop, ms | vmap, ms | model: loop | model: vmap | picked | lost |")
    print("|---|---|---|---|---|---|---|")
    for workload in grid():
        model, support, query = workload.make()
        step = plan_step(
            model, snapshot(model), support, query, inner_lr=workload.inner_lr,
            inner_steps=workload.steps, loss_fn=workload.loss_fn,
        )  # fmt: skip
        planned = step.groups[0][1]
        chunk = cost.chunk_size(planned.chosen.plan.profile, planned.chosen.sizes)
        chunks = {"vmap": chunk}
        if args.chunks:
            chunks |= {f"vmap {c}": c for c in (4, 8, 16) if c < chunk}
        times = measure.interleaved(
            {
                "loop": lambda: generic.run(planned.problem, "loop", 1),  # noqa: B023
                **{
                    name: lambda c=c: generic.run(planned.problem, "vmap", c)  # noqa: B023
                    for name, c in chunks.items()
                },
            },
            args.seconds,
            least=3,
        )
        loop, vmap = cost.seconds(planned.chosen.plan.profile, planned.chosen.sizes, chunk)
        picked = planned.chosen.choice.form
        lost = times[picked] / min(times["loop"], times["vmap"])
        extra = {k: round(v, 2) for k, v in times.items() if k not in ("loop", "vmap")}
        print(
            f"| {workload.name} | {times['loop']:.2f} | {times['vmap']:.2f} | {1e3 * loop:.2f} "
            f"| {1e3 * vmap:.2f} | {picked} | {lost:.2f}x | {extra or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
