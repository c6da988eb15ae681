"""csrc/ compiled once for all tests here: as the extension was, but without Python."""

from __future__ import annotations

import json
from pathlib import Path

import compiling
import pytest

from fastmeta.backends import BUILD_RECORD


@pytest.fixture(scope="session")
def units(tmp_path_factory) -> list[Path]:
    """The object files, of the flags that the installed extension was compiled with."""
    if compiling.COMPILER is None:
        pytest.skip("there is no C++ compiler here")
    record = json.loads(BUILD_RECORD.read_text())
    if not record["built"]:
        pytest.skip("the extension was not built here")
    folder = tmp_path_factory.mktemp("units")
    return compiling.compile_units(folder, *record["flags"], "-fPIC")
