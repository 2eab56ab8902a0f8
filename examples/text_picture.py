"""The picture of text.py: accuracy against the bytes of an expert."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

RIGHT = ("axes fraction", "data")
# label -> colour, and where its name stands, in points from the last point of the line (left: from the first one)
STYLES = {
    "free": ("#c1272d", (7, 2)),
    "free, int8": ("#e4739a", (-7, 4)),
    "free, row-wise": ("#e08a1e", (-7, -7)),
    "free, official rescale": ("#8a5fb0", (7, 0)),
    "EMR": ("#222222", (6, -9)),
    "Twin": ("#23827b", (4, -12)),
    "SMILE": ("#3a6fb0", (7, 0)),
}


def draw(lines: dict[str, list[tuple[float, float]]], path: Path, *, base: float, tuned: float, dense: float) -> None:
    """A line for each kind of expert through its points (bytes, percent right), named at one end.

    `dense` is the bytes of a whole model, `base` and `tuned` the accuracies before merging.
    """
    with plt.rc_context({"axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set_xscale("log")
    axes.axhline(tuned, color="grey", linewidth=1, linestyle=(0, (5, 4)), zorder=0)
    note = {"textcoords": "offset points", "color": "grey"}
    axes.annotate(f"fine-tuned models, {dense / 1e6:.0f} MB each", (1, tuned), (0, 4), RIGHT, ha="right", **note)
    axes.annotate(f"the base alone: {base:.1f} %", (1, 0), (0, 8), "axes fraction", ha="right", **note)
    for label, points in lines.items():
        colour, offset = STYLES[label]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, markersize=5)
        end, side = (points[0], "right") if offset[0] < 0 else (points[-1], "left")
        axes.annotate(label, end, offset, textcoords="offset points", color=colour, ha=side, va="center")
    _label(axes, dense)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(axes: Axes, dense: float) -> None:
    """Sizes in plain numbers: megabytes below, and above the share of a whole model."""
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.5, 1.5 * right)  # room for the names
    share = axes.secondary_xaxis("top", functions=(lambda size: 100 * size / dense, lambda size: size * dense / 100))
    for axis, show in (
        (axes.xaxis, lambda size, _: f"{size / 1e6:g} MB"),
        (share.xaxis, lambda size, _: f"{size:g} %"),
    ):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(show))
    axes.set(xlabel="bytes of an expert", ylabel="accuracy in %, mean of the tasks, each with its expert")
    share.set_xlabel("share of a whole model")
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
