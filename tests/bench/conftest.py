"""Makes `bench` importable.

It is not installed, and the checkout must stay off sys.path, where its fastmeta would hide the
installed one.
"""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])
