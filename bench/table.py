"""The records of a comparison as tables: the best form of each peer, ratios, and every form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
"""One form of one peer on one workload; with `ms` where it was timed, else with `why` not."""

BASELINE = "plain loop"


def best(records: Iterable[Record]) -> Record | None:
    """The fastest that was timed."""
    return min((r for r in records if "ms" in r), key=lambda r: r["ms"], default=None)


def of_peer(records: Iterable[Record], peer: str) -> Record | None:
    return best(r for r in records if r["peer"] == peer)


def ratios(records: Sequence[Record], ours: str) -> tuple[float | None, float | None]:
    """The plain loop's time, and the best peer's, over that of `ours`: above 1 it is faster."""
    own = of_peer(records, ours)
    rivals = of_peer(records, BASELINE), best(r for r in records if r["role"] == "peer")
    loop, peer = (None if own is None or r is None else r["ms"] / own["ms"] for r in rivals)
    return loop, peer


def summary(results: dict[str, list[Record]]) -> str:
    """Milliseconds of each peer's best form, a row a workload; then the ratios."""
    every = [r for records in results.values() for r in records]
    names = list(dict.fromkeys(r["peer"] for r in every))
    ours = list(dict.fromkeys(r["peer"] for r in every if r["role"] == "fastmeta"))
    marks = {r["peer"]: "*" if r["role"] == "yardstick" else "" for r in every}
    header = [
        "workload",
        *(f"{name}{marks[name]}" for name in names),
        *(f"{rival} / {name}" for name in ours for rival in (BASELINE, "best peer")),
    ]
    rows = []
    for workload, records in results.items():
        figures = [of_peer(records, name) for name in names]
        cells = ["–" if f is None else ms(f["ms"]) for f in figures]
        cells += [_ratio(x) for name in ours for x in ratios(records, name)]
        rows.append([workload, *cells])
    notes = "\nMilliseconds, the best form of each. * a yardstick: no library does this as MAML."
    return markdown(header, rows) + notes


def forms(results: dict[str, list[Record]]) -> str:
    """Every form that was timed, with its quartiles, first call and error."""
    header = [
        "workload", "peer", "form", "ms", "quartiles", "rounds x calls", "first call, s", "error",
        "tolerance", "error in float64", "cores used",
    ]  # fmt: skip
    rows = [
        [
            workload, r["peer"], r["form"], ms(r["ms"]), f"{ms(r['lower'])}–{ms(r['upper'])}",
            f"{r['rounds']} x {r['calls']}", f"{r['first_call_s']:.2f}", _error(r["error"]),
            _error(r["tolerance"]), _error(r["error_float64"]), f"{r['cores_used']:.2f}",
        ]
        for workload, records in results.items()
        for r in records
        if "ms" in r
    ]  # fmt: skip
    return markdown(header, rows)


def left_out(results: dict[str, list[Record]]) -> str:
    """What was not timed, and why; the same reason on several workloads in one line."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for workload, records in results.items():
        for r in records:
            if "why" in r:
                where.setdefault((r["peer"], r["form"], r["why"]), []).append(workload)
    return "\n".join(
        f"- {peer}{f', {form}' if form else ''} ({', '.join(names)}): {why}"
        for (peer, form, why), names in where.items()
    )


def ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
