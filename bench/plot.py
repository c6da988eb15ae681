"""The figures of `bench.compare` as a bar chart.

python -m bench.plot bench/results/peers.json [docs/images/peers.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import table

OURS, RIVALS, YARDSTICKS = ("#c1272d", "#f08a5d"), "Blues", ("#444444", "#999999")


def plot(results: dict[str, list[table.Record]], path: Path, title: str) -> None:
    """A group of bars a workload, a bar a peer's best form; the lower, the faster."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    every = [r for records in results.values() for r in records if "ms" in r]
    roles = {r["peer"]: r["role"] for r in every}
    # Yardsticks are ticks across the group, not bars beside those who compete.
    bars = [name for name, role in roles.items() if role != "yardstick"]
    colours = _colours(roles)
    figure, axes = pyplot.subplots(figsize=(13, 4.8), layout="constrained")
    width = 0.86 / len(bars)
    for i, name in enumerate(bars):
        places, heights = _figures(results, name)
        offset = (i - (len(bars) - 1) / 2) * width
        axes.bar([p + offset for p in places], heights, width, color=colours[name], label=name)
    for name, role in roles.items():
        if role == "yardstick":
            places, heights = _figures(results, name)
            ends = [p - 0.45 for p in places], [p + 0.45 for p in places]
            axes.hlines(heights, *ends, color=colours[name], linewidth=1.4, label=f"{name} *")
    axes.set_yscale("log")
    axes.set_ylabel("ms per meta-step (log)")
    axes.set_xticks(range(len(results)), results)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _figures(results: dict[str, list[table.Record]], peer: str) -> tuple[list[int], list[float]]:
    found = [(i, table.of_peer(records, peer)) for i, records in enumerate(results.values())]
    timed = [(i, record["ms"]) for i, record in found if record is not None]
    return [i for i, _ in timed], [ms for _, ms in timed]


def _colours(roles: dict[str, str]) -> dict[str, Any]:
    from matplotlib import colormaps

    rivals = [name for name, role in roles.items() if role == "peer"]
    shades = colormaps[RIVALS]
    colours = {name: shades(0.25 + 0.7 * i / max(len(rivals), 1)) for i, name in enumerate(rivals)}
    for role, choice in (("fastmeta", OURS), ("yardstick", YARDSTICKS)):
        names = [name for name, r in roles.items() if r == role]
        colours |= {name: choice[i % len(choice)] for i, name in enumerate(names)}
    return colours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="what bench.compare --output wrote")
    parser.add_argument("image", type=Path, nargs="?", default=Path("docs/images/peers.png"))
    args = parser.parse_args()
    data = json.loads(args.figures.read_text())
    title = (
        f"Second-order MAML, loss and meta-gradient: {data['processor']}, {data['threads']} "
        f"thread(s), {data['date']}.  * yardstick"
    )
    plot(data["results"], args.image, title)


if __name__ == "__main__":
    main()
