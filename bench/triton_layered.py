"""What the layered step by Triton launches and moves, counted by running it without its kernels.

Bytes are those of all operands, each read or written once; the floor's are in `bench/gpu/floor.py`.
No GPU is needed.

TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m bench.triton_layered
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import fastmeta
from bench import convolutions, table
from bench.gpu import floor
from bench.workloads import WORKLOADS, Workload
from fastmeta.executors.layers import program
from fastmeta.plan import verification

HEADER = (
    "workload", "T", "launches of Triton", "of torch", "GB moved", "of Triton", "GFLOP",
    "arithmetic in TF32, ms", "memory, ms",
)  # fmt: skip
MULTIPROCESSORS, MEMORY = 132, 141_000_000_000
"""Of an H200."""


def rows() -> list[Workload]:
    return [WORKLOADS["W5s"], WORKLOADS["W6"].with_tasks(4), WORKLOADS["W5"].with_tasks(32)]


class Counted(TorchDispatchMode):
    """Launches and bytes, by whom; what makes a view of memory launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            launches = launches_of_lists(args) if name.startswith("_foreach") else 1
            self.add("torch", (args, kwargs, given), launches)
        return given

    def triton(self, _: Any, *operands: Any) -> None:
        """In the place of a kernel."""
        self.add("Triton", operands)

    def clear(self) -> None:
        """Begins anew."""
        self.launches.clear()
        self.bytes.clear()

    def add(self, whose: str, operands: Any, launches: int = 1) -> None:
        found = {x.data_ptr(): x for x in pytree.tree_leaves(operands) if isinstance(x, Tensor)}
        self.launches[whose] += launches
        self.bytes[whose] += sum(x.numel() * x.element_size() for x in found.values())


def launches_of_lists(operands: Any) -> int:
    """Of an operator on lists of tensors: one where all lie densely and pairs alike, else each."""
    lists = [x for x in operands if isinstance(x, (list, tuple)) and isinstance(x[0], Tensor)]
    dense = all(torch.ops.aten.is_non_overlapping_and_dense(x) for each in lists for x in each)
    alike = all(
        len({(x.shape, x.stride()) for x in pair}) == 1 for pair in zip(*lists, strict=True)
    )
    return 1 if dense and alike else len(lists[0])


def counted(workload: Workload) -> Counted:
    model, support, query = workload.make()
    options = {
        "inner_lr": workload.inner_lr, "inner_steps": workload.steps, "executor": "layered",
        "loss_fn": workload.loss_fn,
    }  # fmt: skip
    found = Counted()
    with (
        mock.patch.object(verification, "failure", return_value=None),
        mock.patch.object(InterpretedFunction, "run", lambda *a, **_: found.triton(*a)),
        mock.patch.object(program, "_largest", return_value=MEMORY // program._OF_MEMORY),
    ):
        maml = fastmeta.MAML(model, **options)
        compute = maml._compute

        def counting(planned: Any) -> Any:
            compute(planned)  # what is kept is made at a first call
            found.clear()
            with found:
                return compute(planned)

        with mock.patch.object(maml, "_compute", counting):
            maml(support, query)
    return found


def main() -> None:
    importlib.import_module("triton_on_host").register()
    lines: list[list[str]] = []
    for workload in rows():
        found, operations = counted(workload), convolutions.operations(workload)
        moved = sum(found.bytes.values())
        lines.append([
            workload.name, str(workload.tasks), str(found.launches["Triton"]),
            str(found.launches["torch"]), f"{1e-9 * moved:.2f}",
            f"{1e-9 * found.bytes['Triton']:.2f}", f"{1e-9 * operations:.0f}",
            f"{1e3 * operations / (2 * floor.TF32 * floor.CLOCK * MULTIPROCESSORS):.2f}",
            f"{1e3 * moved / floor.BANDWIDTH:.2f}",
        ])  # fmt: skip
    print(table.markdown(HEADER, lines))


if __name__ == "__main__":
    main()
