"""The figures of `bench.growth` as pictures: floor, sizes, memory, forms.

python -m bench.growth.plot bench/results/growth-DATE.json [docs/images]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import table
from bench.growth import floor, forms, steps

COLOURS = {"fused": "#c1272d", "plain loop": "#444444", "torch.func vmap": "#4a90c2"}
LINES = dict(zip(steps.NETWORKS, ("-", "--"), strict=True))
SECOND = "#f08a5d"
VARIES = {"tasks": "tasks T", "steps": "inner steps K", "width": "width w"}


def plot_floor(records: list[table.Record], path: Path, title: str) -> None:
    """Bars: how much of the core's speed the compiled step and the whole call reach."""
    gflops = floor.speed(records)
    figure, (axes,) = _figure(1, title, width=8)
    for offset, part, colour in ((-0.2, "kernel", COLOURS["fused"]), (0.2, "whole", SECOND)):
        heights = [floor.floor_ms(r, gflops) / r[f"{part}_ms"] for r in records]
        places = [place + offset for place in range(len(records))]
        axes.bar(places, heights, 0.4, color=colour, label=part)
    axes.axhline(floor.SHARE, color=COLOURS["plain loop"], linewidth=1, label=floor.PERCENT)
    axes.set_xticks(range(len(records)), [r["workload"].replace(" at ", "\n") for r in records])
    axes.set_ylabel("of a large product's speed")
    _save(figure, path, [axes])


def plot_sizes(records: list[table.Record], path: Path, title: str) -> None:
    """Milliseconds by tasks, steps and width: a line a network and contender."""
    figure, panels = _figure(len(VARIES), title)
    for axes, (varies, label) in zip(panels, VARIES.items(), strict=True):
        found = [(r["network"], r["value"], r["ms"]) for r in records if r["varies"] == varies]
        _lines(axes, found)
        axes.set_xlabel(label)
        axes.set_yscale("log")
    panels[0].set_ylabel("ms per meta-step")
    _save(figure, path, panels)


def plot_memory(records: list[table.Record], path: Path, title: str) -> None:
    """Megabytes above the process at rest, by tasks."""
    figure, (axes,) = _figure(1, title, width=6)
    _lines(axes, [(r["network"], r["tasks"], r["megabytes"]) for r in records])
    axes.set_xlabel(VARIES["tasks"])
    axes.set_ylabel("MB")
    # What needs none is at the bottom, on a line that is no logarithm.
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    _save(figure, path, [axes])


def plot_forms(records: list[table.Record], path: Path, title: str) -> None:
    """The primal form's time over the dual one's, by inputs; filled where the dual is taken."""
    from matplotlib import colormaps

    # Only many tasks that share one support set; the table has all cases.
    most = max(r["tasks"] for r in records)
    records = [r for r in records if r["tasks"] == most and not r.get("per_step")]
    sets = list(
        dict.fromkeys((r["tasks"], r["query"] == r["support"], r["steps"]) for r in records)
    )
    figure, panels = _figure(len(sets), title)
    counts = sorted({r["support"] for r in records})
    shades = colormaps["Reds"]
    for axes, (tasks, alike, inner) in zip(panels, sets, strict=True):
        for i, count in enumerate(counts):
            line = [
                r
                for r in records
                if (r["tasks"], r["query"] == r["support"], r["steps"], r["support"])
                == (tasks, alike, inner, count)
            ]
            _line_of_forms(axes, line, shades(0.35 + 0.6 * i / len(counts)), f"N={count}")
        axes.axhline(1, color=COLOURS["plain loop"], linewidth=0.8)
        values = sorted({r["inputs"] for r in records})
        axes.set_xscale("log")
        axes.set_xticks(values[::2], values[::2])
        axes.minorticks_off()
        axes.set_title(f"T={tasks}, Q={'N' if alike else forms.QUERY}, K={inner}", fontsize=9)
        axes.set_xlabel("inputs D")
    panels[0].set_ylabel("primal / dual time")
    _save(figure, path, panels)


def _line_of_forms(axes: Any, line: list[table.Record], colour: Any, label: str) -> None:
    places, heights = [r["inputs"] for r in line], [forms.ratio(r) for r in line]
    axes.plot(places, heights, color=colour, linewidth=1.2, label=label)
    faces = [colour if r["taken"] == "dual" else "white" for r in line]
    axes.scatter(places, heights, s=14, zorder=3, facecolor=faces, edgecolor=[colour])


PLOTS = {"floor": plot_floor, "sizes": plot_sizes, "memory": plot_memory, "forms": plot_forms}


def _figure(panels: int, title: str, width: float = 11) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, panels, figsize=(width, 3.6), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=9)
    return figure, list(grid[0])


def _lines(axes: Any, found: list[tuple[str, int, dict[str, float]]]) -> None:
    """A line a network and contender through (value, figure); both axes in powers."""
    for (network, line), (contender, colour) in itertools.product(LINES.items(), COLOURS.items()):
        points = [
            (x, by[contender]) for name, x, by in found if name == network and contender in by
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), line, color=colour, marker=".", linewidth=1.2,
                label=f"{contender}, {network}",
            )  # fmt: skip
    values = sorted({value for _, value, _ in found})
    axes.set_xscale("log")
    axes.set_xticks(values, values)
    axes.minorticks_off()


def _save(figure: Any, path: Path, panels: Sequence[Any]) -> None:
    from matplotlib import pyplot

    labels: dict[str, Any] = {}
    for axes in panels:
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(
        labels.values(),
        labels,
        loc="outside lower center",
        ncols=3 * min(len(panels), 2),
        fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, help="what bench.growth wrote")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    args = parser.parse_args()
    figures = json.loads(args.figures.read_text())
    about = f"{figures['processor']}, {figures['threads']} thread, {figures['date']}"
    for name, draw in PLOTS.items():
        if records := figures["sections"].get(name):
            draw(records, args.folder / f"growth-{name}.png", f"Fused meta-step: {about}")


if __name__ == "__main__":
    main()
