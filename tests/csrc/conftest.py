"""csrc/ compiled once for all tests here: as the extension was, but without Python."""

from __future__ import annotations

import json
import os
from pathlib import Path

import compiling
import pytest
from filelock import FileLock

from fastmeta.backends import BUILD_RECORD


@pytest.fixture(scope="session")
def units(tmp_path_factory) -> list[Path]:
    """The object files, of the flags that the installed extension was compiled with.

    Those of the extension itself where its build left them here; compiled by one of pytest's
    workers for all of them otherwise.
    """
    if compiling.COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    record = json.loads(BUILD_RECORD.read_text())
    if not record["built"]:
        pytest.skip("the extension was not built here")
    left = compiling.units_of_the_build()
    if left:
        return left
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "units"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp("units")
            compiling.compile_units(unfinished, *record["flags"], "-fPIC")
            unfinished.rename(folder)
    return sorted(folder.glob("*.o"))
