"""The table of cliffs: a line of it, and how it is shown."""

from __future__ import annotations

import json

import pytest
import torch

from bench import cliffs
from bench.cliff_lines import LINES, Calls, Line


def test_lines_have_names_of_their_own() -> None:
    assert len({line.name for line in LINES}) == len(LINES)


def test_a_line_is_timed_and_written(tmp_path, capsys) -> None:
    before = torch.get_num_threads()
    path = tmp_path / "deep" / "cliffs.json"
    cliffs.main(["--only", "clean forward", "--seconds", "0", "--json", str(path)])
    torch.set_num_threads(before)
    written = json.loads(path.read_text())
    (record,) = written["lines"]
    assert min(record["steady"], record["changed"]) > 0
    assert {"commit", "processor", "versions", "date"} <= set(written)
    header, rule, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == row.count("|")
    assert row.startswith(f"| {record['line']} |")


def test_a_ratio_over_its_target_is_bold() -> None:
    def shown(changed: float) -> str:
        record = {"line": "a line", "steady": 2.0, "changed": changed, "target": 1.3}
        return cliffs.markdown([{**record, "executors": ["generic", "generic"]}]).splitlines()[-1]

    assert shown(2.6) == "| a line | 2.000 | 2.600 | 1.30 | 1.3 | generic |"
    assert shown(2.7) == "| a line | 2.000 | 2.700 | **1.35** | 1.3 | generic |"


def test_who_computes_something_else_is_not_timed() -> None:
    calls = Calls(lambda: torch.tensor(1.0), lambda: torch.tensor(2.0))
    with pytest.raises(SystemExit, match="differ; not timed"):
        cliffs.row(Line("a line", 1.1, lambda: calls), 0.0)
