"""Executors taken away, so that a step is computed by others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from fastmeta.executors.every import EXECUTORS
from fastmeta.plan import selection


def leaving(keep: Callable[[str], bool]) -> AbstractContextManager[object]:
    """Steps planned meanwhile are computed by executors of these names alone."""
    left = [executor for executor in EXECUTORS if keep(executor.name)]
    return mock.patch.object(selection, "EXECUTORS", left)


def rules_alone() -> AbstractContextManager[object]:
    """Steps planned meanwhile are not computed by the compiled convolutions."""
    return leaving(lambda name: name != "layered-cpu")
