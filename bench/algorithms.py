"""Algorithms other than MAML beside the loops that people write for them, one thread.

python -m bench.algorithms [--seconds S] [--threads N]

W11 is implicit MAML on 784-64-10, T = 32, N = 10, Q = 150, 16 steps of 0.1, prox 2, 5 steps of
conjugate gradients; W12 Reptile on MAML's Omniglot network of stride 2 with 64 filters, T = 5, 5
steps of 1e-3, each on 10 images of its own, by descent and by Adam; "prototypes" one episode of 60
classes, one support and five query images each, on four blocks of 64 filters. Each row's gradients
are compared with the loop's, relative to their norm; by Adam they differ in the biases before batch
norm, whose gradients are rounding. How times are taken stands in `bench/rounds.py`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta
from bench import cores, rounds
from bench.workloads import StridedConv4, conv4

Call = Callable[[], list[Tensor]]
"""A step; its gradients."""


@dataclass(frozen=True)
class Row:
    """One comparison: the loop that people write, and ours."""

    loop: Call
    ours: Call


def implicit() -> Row:
    """W11."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    parameters = dict(model.named_parameters())
    tasks, rate, prox, steps, cg_steps = 32, 0.1, 2.0, 16, 5
    support = torch.randn(tasks, 10, 784) / 28, torch.randint(10, (tasks, 10))
    query = torch.randn(tasks, 150, 784) / 28, torch.randint(10, (tasks, 150))

    def loss(phi: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, phi, (x,)), y)

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

    def loop() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in parameters.values()]
        for x, y, query_x, query_y in zip(*support, *query, strict=True):
            phi = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
            for _ in range(steps):
                gradients = torch.autograd.grad(loss(phi, x, y), [*phi.values()])
                phi = {
                    n: (p - rate * (g + prox * (p - parameters[n]))).detach().requires_grad_()
                    for (n, p), g in zip(phi.items(), gradients, strict=True)
                }
            leaves = [*phi.values()]
            r = p = [*torch.autograd.grad(loss(phi, query_x, query_y), leaves)]
            at = torch.autograd.grad(loss(phi, x, y), leaves, create_graph=True)
            found = [torch.zeros_like(each) for each in r]
            squared = dot(r, r)
            for _ in range(cg_steps):
                hp = torch.autograd.grad(at, leaves, p, retain_graph=True)
                a = [u + h / prox for u, h in zip(p, hp, strict=True)]
                size = squared / dot(p, a)
                found = [f + size * u for f, u in zip(found, p, strict=True)]
                r = [f - size * u for f, u in zip(r, a, strict=True)]
                before, squared = squared, dot(r, r)
                p = [u + squared / before * v for u, v in zip(r, p, strict=True)]
            total = [t + f / tasks for t, f in zip(total, found, strict=True)]
        return total

    def ours() -> list[Tensor]:
        out = fastmeta.imaml_step(
            model, support, query, prox=prox, cg_steps=cg_steps, inner_lr=rate, inner_steps=steps
        )
        return [*torch.autograd.grad(out.loss, [*parameters.values()])]

    return Row(loop, ours)


def reptile(adam: bool) -> Row:
    """W12."""
    torch.manual_seed(0)
    model = StridedConv4()
    tasks, rate, steps = 5, 1e-3, 5
    data = torch.rand(tasks, steps, 10, 1, 28, 28), torch.randint(5, (tasks, steps, 10))
    rule = fastmeta.inner.Adam(betas=(0.0, 0.999)) if adam else None

    def loop() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for task in range(tasks):
            copied = copy.deepcopy(model)
            parameters = [*copied.parameters()]
            optimizer = (
                torch.optim.Adam(parameters, rate, betas=(0.0, 0.999))
                if adam
                else torch.optim.SGD(parameters, rate)
            )
            for step in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(copied(data[0][task, step]), data[1][task, step]).backward()
                optimizer.step()
            with torch.no_grad():
                for sum_, p, theta in zip(total, parameters, model.parameters(), strict=True):
                    sum_ += (theta - p) / tasks
        return total

    def ours() -> list[Tensor]:
        out = fastmeta.reptile_step(
            model, data, inner_lr=rate, inner_steps=steps, inner_optimizer=rule,
            per_step_support=True,
        )  # fmt: skip
        return [*torch.autograd.grad(out.loss, [*model.parameters()])]

    return Row(loop, ours)


def prototypes() -> Row:
    """One episode of 60 classes."""
    torch.manual_seed(0)
    model, classes = conv4(1, 64, 28, 5)[:-1], 60
    x, query_x = torch.rand(classes, 1, 28, 28), torch.rand(5 * classes, 1, 28, 28)
    y, query_y = torch.arange(classes), torch.arange(classes).repeat(5)

    def loop() -> list[Tensor]:
        z = model(torch.cat([x, query_x]))
        distances = torch.cdist(z[classes:], z[:classes]).square()
        loss = F.cross_entropy(-distances, query_y)
        return [*torch.autograd.grad(loss, [*model.parameters()])]

    def ours() -> list[Tensor]:
        out = fastmeta.prototypical_step(model, (x[None], y[None]), (query_x[None], query_y[None]))
        return [*torch.autograd.grad(out.loss, [*model.parameters()])]

    return Row(loop, ours)


ROWS: dict[str, Callable[[], Row]] = {
    "W11, implicit MAML": implicit,
    "W12, Reptile, descent": lambda: reptile(adam=False),
    "W12, Reptile, Adam": lambda: reptile(adam=True),
    "prototypes": prototypes,
}


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of two gradients, relative to the second's norm."""
    a, b = (torch.cat([g.flatten() for g in each]) for each in (ours, theirs))
    return float((a - b).norm() / b.norm())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each contender")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    cores.restrict(args.threads)
    print("| step | loop, ms | fastmeta, ms | ratio | gradients apart |\n|---|---|---|---|---|")
    for name, make in ROWS.items():
        row = make()
        apart = difference(row.ours(), row.loop())
        found = rounds.times({"loop": row.loop, "ours": row.ours}, args.seconds)
        loop, ours = found["loop"].ms, found["ours"].ms
        print(f"| {name} | {loop:.1f} | {ours:.1f} | {loop / ours:.2f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
