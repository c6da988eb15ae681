"""The threads that a process has before and after steps: `python threads_started.py EXECUTOR`."""

from __future__ import annotations

import json
import os
import sys

import interrupted
import torch


def main(executor: str) -> None:
    model = interrupted.network(executor)
    few = 25 if executor == "fused" else 1  # under a millisecond
    short, long = (interrupted.tasks(executor, tasks) for tasks in (few, 2_000))
    torch.set_num_threads(1)  # while the steps are planned, by torch's own products too
    for data in (short, long):
        interrupted.gradient(model, data, 5, executor)
    torch.set_num_threads(2)
    found = [len(os.listdir("/proc/self/task"))]
    for data in (short, long):
        interrupted.gradient(model, data, 5, executor)
        found.append(len(os.listdir("/proc/self/task")))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
