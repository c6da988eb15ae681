"""A call of many minutes, interrupted: `python interrupted.py fused|layered THREADS`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from fastmeta.executors import call

Pair = tuple[Tensor, Tensor]


def network(executor: str) -> nn.Sequential:
    torch.manual_seed(0)
    if executor == "fused":
        return nn.Sequential(
            nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        )
    norm = nn.BatchNorm2d(32, track_running_stats=False)
    layers = [nn.Conv2d(1, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 1))


def tasks(executor: str, count: int) -> tuple[Pair, Pair]:
    random = torch.Generator().manual_seed(1)
    shape = (10, 1) if executor == "fused" else (5, 1, 14, 14)

    def examples() -> Pair:
        x = torch.randn(count, *shape, generator=random)
        return x, torch.randn(count, shape[0], 1, generator=random)

    return examples(), examples()


def gradient(model: nn.Module, data: tuple[Pair, Pair], steps: int, executor: str) -> list[Tensor]:
    out = fastmeta.maml_step(
        model, *data, inner_lr=1e-3, inner_steps=steps, loss_fn=F.mse_loss, executor=executor
    )
    return list(torch.autograd.grad(out.loss, list(model.parameters())))


def interrupt_the_step() -> None:
    """Sends SIGINT when the main thread has been in one compiled step for half a second."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    found = 0
    while found < 10:
        time.sleep(0.05)
        computes = sys._current_frames()[main_thread].f_code is call.run.__code__
        found = found + 1 if computes else 0
    os.kill(os.getpid(), signal.SIGINT)


def main(executor: str, threads: int) -> int:
    torch.set_num_threads(threads)
    model, few = network(executor), tasks(executor, 40)
    before = gradient(model, few, 1, executor)
    count, steps = (400_000, 200) if executor == "fused" else (4_000, 100)
    many = tasks(executor, count)
    seen: list[FrameType | None] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        seen.append(frame)
        signal.default_int_handler(signum, frame)

    signal.signal(signal.SIGINT, handle)
    threading.Thread(target=interrupt_the_step).start()
    try:
        gradient(model, many, steps, executor)
    except KeyboardInterrupt:
        pass
    else:
        return 1
    assert len(seen) == 1
    assert seen[0] is not None
    assert seen[0].f_code is call.run.__code__
    after = gradient(model, few, 1, executor)
    return int(not all(map(torch.equal, before, after)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
