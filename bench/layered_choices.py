"""The two choices of the layers' rules that were measured: convolutions of all tasks, and chunks.

python -m bench.layered_choices             per-task convolutions, three ways
python -m bench.layered_choices --chunks    a step by how many tasks go at once
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cores, rounds
from bench.layered import OURS, RULES, step
from fastmeta.network.layers import Batch, Conv2d, State, Wanted

# Tasks, examples, channels in and out, side, stride.
CONVOLUTIONS = (
    (32, 5, 1, 64, 28, 2), (32, 5, 64, 64, 14, 2), (32, 5, 64, 64, 4, 2), (32, 5, 64, 64, 2, 2),
    (4, 5, 64, 64, 14, 1), (4, 75, 64, 64, 14, 1), (4, 75, 64, 64, 3, 1), (4, 5, 32, 32, 16, 1),
    (2, 5, 32, 32, 42, 1), (2, 75, 3, 32, 84, 1), (8, 5, 8, 8, 7, 1), (8, 5, 8, 8, 28, 1),
)  # fmt: skip


def rules(x: Tensor, w: Tensor, dy: Tensor, stride: int, below: int) -> Callable[[], object]:
    """Forward and both gradients, all tasks as groups below so many multiply-adds of one."""
    layer = Conv2d("w", None, (stride, stride), (1, 1), (1, 1), 1)
    wanted = Wanted((True,), {"w": len(x)})

    def run() -> object:
        state = State({"w": w}, Batch(len(x), x.shape[1]))
        with mock.patch("fastmeta.network.layers.conv2d._GROUPED_BELOW", below):
            layer.forward(state, x)
            return layer.backward(state, wanted, dy)

    return run


def patches(x: Tensor, w: Tensor, dy: Tensor, stride: int) -> Callable[[], object]:
    """The same as batched products of patches (im2col)."""
    tasks, rows = len(x), w.flatten(2)
    size = tuple(x.shape[-2:])

    def run() -> object:
        columns = F.unfold(x.flatten(0, 1), 3, padding=1, stride=stride)
        columns = columns.unflatten(0, (tasks, -1)).transpose(1, 2).flatten(2)  # [T, C 9, N P]
        torch.bmm(rows, columns)
        delta = dy.flatten(3).transpose(1, 2).flatten(2)  # [T, O, N P]
        to_columns = torch.bmm(rows.mT, delta).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        to_input = F.fold(to_columns.flatten(0, 1), size, 3, padding=1, stride=stride)
        return to_input, torch.bmm(delta, columns.mT)

    return run


def convolutions(seconds: float) -> None:
    print("| T, N, in, out, side, stride | multiply-adds of a task | one by one, ms | groups, ms "
          "| patches, ms |")  # fmt: skip
    print("|---|---|---|---|---|")
    for sizes in CONVOLUTIONS:
        tasks, count, inputs, outputs, side, stride = sizes
        out = (side - 1) // stride + 1
        x = images(tasks, count, inputs, side)
        w, dy = torch.randn(tasks, outputs, inputs, 3, 3), images(tasks, count, outputs, out)
        found = rounds.times(
            {
                "one by one": rules(x, w, dy, stride, 0),
                "groups": rules(x, w, dy, stride, 1 << 60),
                "patches": patches(x, w, dy, stride),
            },
            seconds,
        )
        work = count * out * out * math.prod(w.shape[1:])
        cells = " | ".join(f"{timing.ms:.2f}" for timing in found.values())
        print(f"| {', '.join(map(str, sizes))} | {work:,} | {cells} |", flush=True)


def images(tasks: int, count: int, channels: int, side: int) -> Tensor:
    """Channels last."""
    return torch.randn(tasks, count, side, side, channels).movedim(-1, 2)


def chunks(seconds: float) -> None:
    print("| workload | " + " | ".join(f"{1 << k} MB" for k in range(0, 8, 2)) + " |")
    print("|---" * 5 + "|")
    for name in ("W5s", "W5", "separable"):
        cells: list[str] = []
        for k in range(0, 8, 2):
            largest = 1 << 20 + k
            with mock.patch("fastmeta.executors.layers.program._LARGEST", largest):
                call = step(RULES, OURS[name], *OURS[name].make())
                call()
            cells.append(f"{rounds.times({name: call}, seconds)[name].ms:.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.3, help="per contender")
    args = parser.parse_args()
    cores.restrict(1)
    (chunks if args.chunks else convolutions)(args.seconds)


if __name__ == "__main__":
    main()
