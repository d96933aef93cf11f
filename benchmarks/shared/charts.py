"""Draws the charts, which are legible on white and on black."""

# matplotlib gives its **kwargs no types.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.report import RESULTS
from benchmarks.shared.implementations import ARTICLE, BARE, FASTAPI_DISCONNECT, MIDDLEWARE, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#808080"  # legible on white and on black
COLOURS = {
    BARE: "#909090",
    OURS: "#f2711c",
    ARTICLE: "#4c8fd6",
    "handler task": "#2fa58a",
    "polling": "#a97fd0",
    FASTAPI_DISCONNECT: "#c9a227",
    MIDDLEWARE: "#8a6d3b",
    "aiofence": "#d45d8c",
    "receive()": "#909090",
}
WIDTH, HEIGHT = 8.0, 3.6  # inches, of 100 pixels

Numbers = dict[str, dict[str, float]]  # by implementation, then by group or place on the x-axis


def bars(file: str, title: str, numbers: Numbers) -> None:
    """Draw groups of bars, one bar for each implementation."""
    figure, axes = _axes(title)
    width = 0.85 / len(numbers)
    for place, (name, values) in enumerate(numbers.items()):
        at = [group + (place - (len(numbers) - 1) / 2) * width for group in range(len(values))]
        axes.bar(at, list(values.values()), width * 0.9, label=name, color=COLOURS[name])
    groups = list(next(iter(numbers.values())))
    axes.set_xticks(range(len(groups)), ["\n".join(fill(line, 20) for line in group.split(", ")) for group in groups])
    axes.tick_params(axis="x", length=0)
    _write(file, figure, axes)


def lines(file: str, title: str, under: str, numbers: Numbers) -> None:
    """Draw a line for each implementation, over numbers at equal distances on the x-axis."""
    figure, axes = _axes(title)
    for name, values in numbers.items():
        thick = 3 if name == OURS else 1.5
        axes.plot(list(values), list(values.values()), label=name, color=COLOURS[name], linewidth=thick, marker="o")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(under, color=GREY)
    _write(file, figure, axes)


def _axes(title: str) -> tuple[Figure, Axes]:
    # Imported here because server processes import this module too, and would take seconds longer to start.
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "cancelonleave"})
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, color=GREY, loc="left", fontsize=11)
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)
    return figure, axes


def _write(file: str, figure: Figure, axes: Axes) -> None:
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=GREY)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{file}.svg", transparent=True, metadata={"Date": None})
