"""What all plots share: one palette, curves over the context length as a PNG, and plots as SVG for our HTML pages."""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from yoco_u.files import GENERATOR, check_result, replacing
from yoco_u.formatting import context_label

PALETTE = (
    ("#0072b2", "#5ab4f0"),
    ("#d55e00", "#ff8f4d"),
    ("#009e73", "#3dcca3"),
    ("#b5609a", "#e69ccb"),
    ("#a67500", "#f0c04a"),
    ("#5a5a5a", "#b4b4b4"),
)
"""Okabe and Ito's colour-blind-safe colours, each for light pages and for dark ones. From the seventh line on the colours come
again, with another line style (`dashes`) or marker (`ContextPlot`)."""

Dashes = str | tuple[float, tuple[float, ...]]
"""A line style of matplotlib."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
_STROKE, _DOT = (7.0, 3.0), (1.2, 2.2)
_INK = "#0a0b0c"  # drawn for text and axes, then replaced by the text colour of the page
_numbers = count()


def colour(index: int) -> str:
    """The colour of line number `index`, for light pages; `svg` replaces it by a variable that follows the page."""
    return PALETTE[index % len(PALETTE)][0]


def dashes(index: int) -> Dashes:
    """The line style of line number `index`: one for each time that the colours have come again."""
    again = index // len(PALETTE)
    return ("-", "--", ":", "-.")[again] if again < 4 else (0.0, _STROKE + (again - 2) * _DOT)


def css_dashes(index: int) -> str:
    """The line style of line number `index` as `stroke-dasharray` of an SVG has it."""
    again = index // len(PALETTE)
    if again < 4:
        return ("none", "6 3", "2 3", "7 3 2 3")[again]
    return " ".join(f"{length:g}" for length in _STROKE + (again - 2) * _DOT)


class ContextPlot:
    """Curves over the context length: panels side by side, and one legend for all of them.

    Args:
        titles: title of each panel.
        x_label: label of the axis of contexts, which is logarithmic.
        logarithmic: whether the axis of values is logarithmic too.

    Attributes:
        axes: the axes of each panel.
    """

    def __init__(self, titles: Sequence[str], x_label: str = "context, tokens", logarithmic: bool = True) -> None:
        self.x_label, self.logarithmic = x_label, logarithmic
        self.figure = Figure(figsize=(13 / 3 * len(titles), 4.2), layout="constrained", dpi=150)
        self.axes: list[Axes] = list(self.figure.subplots(1, len(titles), squeeze=False)[0])
        for axes, title in zip(self.axes, titles, strict=True):
            axes.set_title(title)

    def line(
        self,
        panel: int,
        index: int,
        points: Sequence[tuple[int, float | None]],
        label: str = "",
        style: str = "-",
        marker: str = "o",
    ) -> None:
        """Draw a curve.

        Args:
            index: number of the curve, which chooses its colour and, where the colours come again, its marker.
            points: context and value of each point; a value of None leaves a gap.
            label: name in the legend, which lists the labelled curves of the first panel.
            style: line style of matplotlib.
            marker: an empty one leaves the points unmarked.
        """
        x = [context for context, _ in points]
        y = [float("nan") if value is None else value for _, value in points]
        label = label and plain(label)
        marker = marker and _MARKERS[index // len(PALETTE) % len(_MARKERS)]
        self.axes[panel].plot(
            x, y, color=colour(index), label=label, marker=marker, markersize=3.5, linewidth=1.5, linestyle=style
        )

    def write(self, path: Path, contexts: Sequence[int]) -> None:
        """Label the axes, with ticks at `contexts`, and write the PNG."""
        for axes in self.axes:
            _finish(axes, contexts, self.logarithmic)
            axes.set_xlabel(self.x_label)
        handles, labels = self.axes[0].get_legend_handles_labels()
        columns = max(1, min(len(labels), 8 * len(self.axes) // 3))
        self.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        save_png(self.figure, path)


def plain(label: str) -> str:
    """The label, changed so that matplotlib neither hides it (leading _) nor reads it as a formula ($)."""
    return label.replace("$", r"\$").lstrip("_") or "-"


def has_positive(axes: Axes) -> bool:
    """Whether one value at least can be drawn over a logarithmic axis of values, which matplotlib does not draw otherwise."""
    return any(0 < value < math.inf for line in axes.lines for value in np.asarray(line.get_ydata()))


def with_room(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis on which values from `low` to `high` stand, further apart than matplotlib needs."""
    room = 0.05 * (high - low)
    if room <= 1e-8 * abs(high):
        room = max(0.1, 0.01 * abs(high))
    return low - room, high + room


def open_frame(axes: Axes, grid: float, which: Literal["major", "both"] = "major") -> None:
    """Draw a grid of this opacity, at the minor ticks too for `both`, and no frame above and to the right."""
    axes.grid(alpha=grid, which=which)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(axes: Axes, contexts: Sequence[int], logarithmic: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_label(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic and has_positive(axes):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    open_frame(axes, grid=0.2, which="both")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, unless something else is there; errors as of `check_result`."""
    check_result(path)
    with replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": GENERATOR})


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (5.2, 3.5)) -> str:
    """Draw a plot as an `<svg>` element that stands in an HTML page.

    It has no fonts and no links, and shares no identifier with another plot of the page. Colours of the palette, text and axes
    follow the page, light or dark.

    Args:
        draw: draws on the axes that it is given.
        size: width and height in inches, at a font of 10.5 points. On the page the plot is as wide as there is room.
    """
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"plot {next(_numbers)}", "font.size": 10.5, **ink}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        open_frame(axes, grid=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        draw(axes)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace(_INK, "currentColor")
    for number, (light, _) in enumerate(PALETTE):
        text = text.replace(light, f"var(--run-{number})")
    return text


def budget_formatter(x: str) -> Formatter:
    """The formatter of an axis of `tokens` (2.5M) or `flops` (1.2e13)."""
    return EngFormatter(sep="") if x == "tokens" else FuncFormatter(_scientific)


def _scientific(value: float, _: float) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
