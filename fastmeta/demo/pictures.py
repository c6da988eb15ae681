"""The pictures that the demonstrations leave behind."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastmeta.demo.confidence import Estimate

_BLUE = "#0072b2"
_ORANGE = "#d55e00"  # told from the blue by colour-blind eyes too
_GREY = "#8c8c8c"
_LARGEST_GRID = (10, 3)  # classes, and images of one class in either set


def sinusoid_picture(
    path: Path,
    x: Tensor,
    truth: Tensor,
    support: tuple[Tensor, Tensor],
    before: Tensor,
    after: Tensor,
    joint: Tensor,
    steps: int,
) -> None:
    """Draw a few regression tasks side by side.

    **Arguments:** `x`: [X, 1]. `truth`, `before`, `after`, `joint`: [T, X, 1], the curves and what
    MAML (before and after adaptation) and the jointly trained network (after it) predict.
    `support`: (x, y), [T, N, 1]. `steps`: inner steps that were taken.
    """
    curves = (
        ("true curve", truth, {"color": "black", "lw": 4, "alpha": 0.25}),
        (f"joint training, {steps} steps", joint, {"color": _GREY, "lw": 1.2, "ls": ":"}),
        ("MAML, before", before, {"color": _BLUE, "lw": 1.4, "ls": "--"}),
        (f"MAML, {steps} steps", after, {"color": _ORANGE, "lw": 2}),
    )
    points = x[:, 0].cpu().numpy()
    support_x, support_y = (values[..., 0].cpu().numpy() for values in support)  # [T, N]
    figure = Figure(figsize=(4.2 * len(truth), 3.9), layout="constrained")
    axes = figure.subplots(1, len(truth), sharey=True, squeeze=False)[0]
    for i, panel in enumerate(axes):
        for label, y, style in curves:
            panel.plot(points, y[i, :, 0].cpu().numpy(), label=label, **style)
        dots = {"color": "black", "ms": 5, "zorder": 5}
        panel.plot(support_x[i], support_y[i], "o", label="support examples", **dots)
        panel.set_title(f"held-out task {i + 1}", fontsize=11)
        panel.set_xlabel("x")
        panel.set_xlim(points[0], points[-1])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    axes[0].set_ylabel("y")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def episode_picture(
    path: Path,
    title: str,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    probabilities: Tensor,
) -> None:
    """Draw one classification task: a column a class, its support images above its query images.

    **Arguments:** `support`, `query`: (x, y), x [N, ..., H, W] and y [N]. `probabilities`:
    [Q, ways], the adapted network's for the query images.
    """
    ways = min(probabilities.shape[1], _LARGEST_GRID[0])
    shots = min(int((support[1] == 0).sum()), _LARGEST_GRID[1])
    queries = min(int((query[1] == 0).sum()), _LARGEST_GRID[1])
    rows = shots + queries
    if ways < probabilities.shape[1]:
        title = f"{title} (the first {ways} of {probabilities.shape[1]} classes)"
    figure = Figure(figsize=(1.5 * ways + 0.5, 1.8 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(rows, ways, squeeze=False)
    for way in range(ways):
        panels[0, way].set_title(_letter(way), fontsize=12)
        for panel, image in zip(panels[:shots, way], support[0][support[1] == way], strict=False):
            _show_image(panel, image, "black")
        mine = query[1] == way
        for panel, image, chances in zip(
            panels[shots:, way], query[0][mine], probabilities[mine], strict=False
        ):
            guess = int(chances.argmax())
            answer = (
                f"✓ {_letter(way)}" if guess == way else f"✗ {_letter(guess)}, is {_letter(way)}"
            )
            colour = _BLUE if guess == way else _ORANGE
            _show_image(panel, image, colour)
            chance = f"{100 * float(chances[guess]):.0f} %"
            panel.set_title(f"{answer}   {chance}", fontsize=10, color=colour)
    for row in range(rows):
        panels[row, 0].set_ylabel("support" if row < shots else "query", fontsize=11)
    figure.savefig(path, dpi=150)


def accuracy_picture(path: Path, curve: list[tuple[int, Estimate]], test: Estimate) -> None:
    """Draw the accuracy on validation characters over meta-steps, and that of the test at the end.

    **Arguments:** `curve`: meta-steps and the accuracy after them, with its 95 % interval.
    """
    steps = [at for at, _ in curve]
    means = [100 * seen.mean for _, seen in curve]
    widths = [100 * seen.half_width for _, seen in curve]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        steps, means, widths, color=_BLUE, marker="o", ms=4, capsize=3, label="validation"
    )
    width = 100 * test.half_width
    axes.axhline(100 * test.mean, color=_ORANGE, lw=1.4, label="test, after all meta-steps")
    axes.axhspan(100 * test.mean - width, 100 * test.mean + width, color=_ORANGE, alpha=0.15, lw=0)
    axes.set_xlabel("meta-steps")
    axes.set_ylabel("query images right, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def _letter(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way + 1)


def _show_image(panel: Axes, image: Tensor, colour: str) -> None:
    panel.imshow(image.reshape(image.shape[-2:]).cpu().numpy(), cmap="gray_r")
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2 if colour != "black" else 0.8)
