"""The Python of the pages in docs/ runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["algorithms.md", "expressions.md", "inner_optimizers.md", "linearize.md", "networks.md"]


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page}  # a module of its own, as a reader's script is
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_conjugate_gradients_solve_their_system() -> None:
    enough = "residual = new\n    if dot(new, new).max() < 1e-9: break"
    page = (DOCS / "linearize.md").read_text(encoding="utf-8")
    page = page.replace("range(5)", "range(300)").replace("residual = new", enough)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        block = block.replace(
            "residual = new", "residual = new\n    if dot(new, new).max() < 1e-9: break"
        )
        exec(compile(block, "linearize.md", "exec"), names)
    solution, at, prox = names["solution"], names["at"], names["prox"]
    products = at.hvp(solution)
    for name, gradient in at.gradients.items():
        left = solution[name] + products[name] / prox
        torch.testing.assert_close(left, gradient, rtol=1e-3, atol=1e-4)
