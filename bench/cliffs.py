"""The time that a step loses by what should cost nothing.

python -m bench.cliffs                              all lines
python -m bench.cliffs --only annealed --json FILE  those with that in their names

Each line times a steady call and the same call under a change (or a network beside its plain twin,
`auto` beside the best that could have been chosen): medians, a call of each in turn, one thread but
where the line says otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure, table
from bench.cliff_lines import LINES, OTHERWISE, THREADED, Line
from bench.compare import machine
from bench.growth import threads
from bench.table import Record

HEADER = ["line", "steady, ms", "changed, ms", "ratio", "target", "executors"]


def row(line: Line, seconds: float) -> Record:
    """The medians of one line, and what computed them."""
    steady, changed = line.make()
    first = steady(), changed()
    if line.same:
        one, other = (float(_loss(out)) for out in first)
        if abs(one - other) > 1e-3 * abs(one):
            raise SystemExit(f"{line.name}: losses {one} and {other} differ; not timed")
    calls = {"steady": steady, "changed": changed}
    if line.calls:
        found = measure.interleaved(calls, 0.0, line.calls - 1)  # which warms up by one
    else:
        found = measure.interleaved(calls, seconds)
    executors = [getattr(out, "executor", "loop by hand") for out in first]
    return {"line": line.name, **found, "target": line.target, "executors": executors}


def _loss(out: Any) -> Tensor:
    return (out if isinstance(out, Tensor) else out.loss).detach()


def threaded(names: list[str], seconds: float) -> Iterator[Record]:
    """Two threads beside one."""
    for found in threads.measure(names, seconds, 5):
        one, two = found["ms"].values()
        yield {
            "line": f"two threads, {found['workload']}", "steady": one, "changed": two,
            "target": OTHERWISE, "executors": [],
        }  # fmt: skip


def markdown(records: list[Record]) -> str:
    """The table; a ratio over its target is bold."""
    rows: list[list[str]] = []
    for r in records:
        ratio = r["changed"] / r["steady"]
        shown = f"{ratio:.2f}" if ratio <= r["target"] else f"**{ratio:.2f}**"
        executors = ", ".join(dict.fromkeys(r["executors"]))
        times = table.ms(r["steady"]), table.ms(r["changed"])
        rows.append([r["line"], *times, shown, f"{r['target']}", executors])
    return table.markdown(HEADER, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="lines with this in their names")
    parser.add_argument("--seconds", type=float, default=6.0, help="per line")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {**machine(1), "commit": _commit()}
    print(f"{about['processor']}, {about['date']}, commit {about['commit']}")
    records = [row(line, args.seconds) for line in LINES if args.only in line.name]
    names = [name for name in THREADED if args.only in f"two threads, {name}"]
    records += threaded(names, args.seconds) if names else []
    print(markdown(records))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "lines": records}, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
