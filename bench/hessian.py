"""A Hessian-vector product by autograd: double backward beside forward over reverse.

python -m bench.hessian
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from bench import measure
from bench.workloads import WORKLOADS, Workload

WAYS = ("double backward", "forward over reverse")


class Product:
    """`H v` of a workload's support loss at one task."""

    def __init__(self, workload: Workload) -> None:
        self.loss_fn = workload.loss_fn
        if workload.classes is None:  # torch's own mse_loss has no usable forward-mode rule
            self.loss_fn = lambda p, t: (p - t).square().mean()
        self.model, support, _ = workload.make()
        self.x, self.y = support[0][0], support[1][0]
        self.point = {n: p.detach().requires_grad_() for n, p in self.model.named_parameters()}
        self.vector = [torch.randn_like(p) for p in self.point.values()]

    def by(self, way: str) -> list[Tensor]:
        if way == "double backward":
            gradients = torch.autograd.grad(
                self._loss(self.point), list(self.point.values()), create_graph=True
            )
            return list(torch.autograd.grad(gradients, list(self.point.values()), self.vector))
        with forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(p, v)
                for (name, p), v in zip(self.point.items(), self.vector, strict=True)
            }
            gradients = torch.autograd.grad(self._loss(dual), list(dual.values()))
            return [forward_ad.unpack_dual(g).tangent.detach() for g in gradients]

    def _loss(self, parameters: dict[str, Tensor]) -> Tensor:
        return self.loss_fn(functional_call(self.model, parameters, (self.x,)), self.y)


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        product = Product(WORKLOADS[sys.argv[1]])
        peak = measure.peak_above_start(lambda: product.by(sys.argv[2]))
        print(json.dumps({"megabytes": peak}))
        return
    print("| workload | double backward, ms | forward over reverse, ms | MB | MB |")
    print("|---|---|---|---|---|")
    for name in ("W1", "W2", "W3", "W4", "W5", "W5s", "W6"):
        product = Product(WORKLOADS[name])
        both = [torch.cat([p.flatten() for p in product.by(way)]) for way in WAYS]
        if (both[0] - both[1]).norm() > 1e-3 * both[0].norm():
            raise SystemExit(f"{name}: the two products disagree; not timed")
        times = measure.interleaved(
            {way: lambda way=way: product.by(way) for way in WAYS},  # noqa: B023
            seconds=2.0,
        )
        memory = [measure.in_fresh_process("bench.hessian", name, way)["megabytes"] for way in WAYS]
        print(f"| {name} | {times[WAYS[0]]:.2f} | {times[WAYS[1]]:.2f} "
              f"| {memory[0]:.0f} | {memory[1]:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
