"""The table of operations that a step's kernel works through."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmeta.executors.fused.lowering import Dense
from fastmeta.executors.fused.operations.views import View


class Table:
    """Records in the making; `fastmeta.kernels.record` says what stands where in one."""

    def __init__(self, one: View) -> None:
        self._one = one
        self._record: Any = importlib.import_module("fastmeta.kernels.record")
        self._views: Any = {
            name: importlib.import_module(f"fastmeta.kernels.{name}")
            for name in ("products", "norms", "losses")
        }
        self._operations: list[list[int]] = []
        self._numbers: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._operations)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The integers [operations, FIELDS] and the numbers [operations, NUMBERS]."""
        numbers = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")
        return torch.tensor(self._operations, device="cpu"), numbers

    def product(
        self,
        kind: str,
        out: View,
        first: tuple[View, View] | None = None,
        second: tuple[View, View] | None = None,
        scale: View | None = None,
        ending: tuple[View | None, ...] = (),
        out2: View | None = None,
        layer: Dense | None = None,
        prox: float = 0.0,
    ) -> None:
        """`out = end(A B + A2 (B2 * scale))`, `first` and `second` being the factors.

        `layer` is the one whose activation the ending takes; `scale` is 1 where none is given, and
        of the ending what is None is 0.
        """
        views = {"OUT": out, "OUT2": out2 or out}
        if second:
            views["SCALE"] = scale or self._one.like(second[1])
        for name, view in zip(("E1", "E2", "E3", "E4", "E5"), ending, strict=False):
            if view:
                assert (view.rows, view.cols) == (out.rows, out.cols)
                views[name] = view
        depths = {"DEPTH": 0, "DEPTH2": 0}
        for (left, right), length, pair in (
            (("A", "B"), "DEPTH", first),
            (("A2", "B2"), "DEPTH2", second),
        ):
            if pair is None:
                continue
            a, b = pair
            assert (a.rows, a.cols, b.cols) == (out.rows, b.rows, out.cols)
            views |= {left: a, right: b}
            depths[length] = a.cols
        options = layer.options if layer else (0.0, 0.0)
        function = layer.activation if layer else 0
        self._add("products", kind, out, views, (*options, prox, 0.0), FUNCTION=function, **depths)

    def norm(self, kind: str, layer: Dense, like: View, **views: View) -> None:
        """A rule of the layer's norm, over a matrix as large as `like`."""
        assert layer.norm is not None
        share = 1.0 / like.rows if layer.norm.batch_statistics else 0.0
        self._add("norms", kind, like, views, (layer.norm.eps, share, 0.0, 0.0))

    def loss(self, kind: str, loss: int, option: float, like: View, **views: View) -> None:
        """A rule of the loss, of predictions as large as `like`."""
        height = 1.0 / option if loss == self._views["losses"].SMOOTH_L1.value else 1.0
        self._add("losses", kind, like, views, (option, height, 0.0, 0.0), LOSS=loss)

    def _add(
        self,
        room: str,
        kind: str,
        like: View,
        views: Mapping[str, View],
        numbers: tuple[float, ...],
        **fields: int | None,
    ) -> None:
        record = self._record
        row = [0] * record.FIELDS.value
        row[record.KIND.value] = getattr(record, kind).value
        row[record.ROWS.value], row[record.COLS.value] = like.rows, like.cols
        for name, value in fields.items():
            row[getattr(record, name).value] = value or 0
        for name, view in views.items():
            start = record.VIEWS.value + 4 * getattr(self._views[room], name).value
            row[start : start + 4] = view.offset, view.task, view.row, view.col
        self._operations.append(row)
        self._numbers.append(list(numbers))
