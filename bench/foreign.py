"""Networks with layers that have no rules of their own: by `vmap` within the layers, and without.

python -m bench.foreign
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastmeta

SECONDS = 8.0


class Block(nn.Module):
    """A transformer block between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 5)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.block(self.embed(x)).mean(1))))


def mlp(between: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 40), between(), nn.Linear(40, 40), between(), nn.Linear(40, 5)
    )


def conv4() -> nn.Module:
    parts: list[nn.Module] = []
    for i in range(4):
        parts += [nn.Conv2d(32 if i else 1, 32, 3, padding=1), nn.BatchNorm2d(32)]
        parts += [nn.Softshrink() if i == 1 else nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 5))


# Network, example, tasks, examples of a set.
CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    *(("MLP, PReLU", lambda: mlp(nn.PReLU), (1,), tasks, 10) for tasks in (4, 10, 25)),
    *(("MLP, Softshrink", lambda: mlp(nn.Softshrink), (1,), tasks, 10) for tasks in (4, 25)),
    ("conv4, one Softshrink", conv4, (1, 28, 28), 4, 5),
    *(("transformer block", Block, (12, 8), tasks, 5) for tasks in (4, 16)),
]


def main() -> None:
    torch.set_num_threads(1)
    fastmeta.set_cliff_warnings(False)
    print("| network | tasks | layered, ms | generic, ms | auto, ms | generic / layered |")
    print("|---|---|---|---|---|---|")
    for name, make, shape, tasks, count in CASES:
        data = [(torch.randn(tasks, count, *shape), torch.randint(5, (tasks, count))) for _ in "sq"]
        models = {executor: make() for executor in ("layered", "generic", "auto")}
        times: dict[str, list[float]] = {executor: [] for executor in models}
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times["auto"]) < 5:
            for executor, model in models.items():
                start = time.perf_counter()
                out = fastmeta.maml_step(
                    model, *data, inner_lr=0.05, inner_steps=3, executor=executor
                )
                out.loss.backward()
                times[executor].append(time.perf_counter() - start)
        layered, generic, auto = (1e3 * statistics.median(each) for each in times.values())
        ratio = generic / layered
        print(f"| {name} | {tasks} | {layered:.1f} | {generic:.1f} | {auto:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
