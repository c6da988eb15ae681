"""How the fused step grows, measured whole: the tables of docs/performance.md and docs/design.md.

python -m bench.growth                     all sections, under eight minutes
python -m bench.growth --quick             a coarse run of about a minute
python -m bench.growth --only floor sizes  some sections
python -m bench.growth --tables FILE.json  the tables of an earlier run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import compare, table
from bench.growth import estimates, floor, forms, memory, sizes, threads

Records = list[table.Record]


def _floor(quick: bool) -> Records:
    return [floor.measure(name, 0.1 if quick else 1.0) for name in compare.MLPS]


def _threads(quick: bool) -> Records:
    return threads.measure(compare.MLPS, 0.1 if quick else 1.2, 1 if quick else 4)


def _sizes(quick: bool) -> Records:
    return [sizes.measure(p, 0.1 if quick else 0.6) for p in sizes.points(quick)]


def _memory(quick: bool) -> Records:
    return [memory.measure(point) for point in memory.points(quick)]


def _forms(quick: bool) -> Records:
    return [forms.measure(case, 0.05 if quick else 0.15) for case in forms.cases(quick)]


def _estimates(quick: bool) -> Records:
    return [estimates.measure(w, 0.1 if quick else 0.6) for w in estimates.shapes(quick)]


SECTIONS: dict[str, tuple[str, Callable[[bool], Records], Callable[[Records], str]]] = {
    "floor": ("Fraction of the floor", _floor, floor.markdown),
    "threads": ("Two threads beside one", _threads, threads.markdown),
    "sizes": ("Growth with tasks, steps and width", _sizes, sizes.markdown),
    "memory": ("Peak memory", _memory, memory.markdown),
    "forms": ("Crossover of primal and dual", _forms, forms.markdown),
    "estimates": ("Fused or general path", _estimates, estimates.markdown),
}


def tables(figures: table.Record) -> str:
    """All sections of a run as they are pasted into the documents."""
    return "\n\n".join(
        f"### {title}\n\n{markdown(figures['sections'][name])}"
        for name, (title, _, markdown) in SECTIONS.items()
        if name in figures["sections"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few points, short times")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="instead of bench/results/growth-DATE.json")
    parser.add_argument("--tables", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if args.tables:
        print(tables(json.loads(args.tables.read_text())))
        return
    torch.set_num_threads(1)
    figures = {**compare.machine(1), "quick": args.quick, "sections": {}}
    output = args.output or Path(f"bench/results/growth-{figures['date']}.json")
    for name in args.only:
        print(f"... {name}", file=sys.stderr, flush=True)
        figures["sections"][name] = SECTIONS[name][1](args.quick)
        # After every section: a long run may be cut short.
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n")
    print(tables(figures))


if __name__ == "__main__":
    main()
