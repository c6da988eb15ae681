"""Who may import whom: faces, plan, executors, network, and nothing back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastmeta"
FACES = (
    "algorithms", "adaptation", "linearize", "evaluation", "arguments", "modes", "explanation",
    "capture",
)  # fmt: skip
FORBIDDEN = {
    "network": ("executors", "plan", *FACES), "executors": ("plan", *FACES), "plan": FACES,
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """What a file imports of the package, by the names behind `fastmeta.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {name.removeprefix("fastmeta.") for name in found if name.startswith("fastmeta.")}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_imports_what_stands_above_it(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in sorted(imported(file))
        if name.split(".")[0] in FORBIDDEN[folder]
    ]
    assert wrong == []
