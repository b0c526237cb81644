"""The report's plots: SVG that takes its text and line colours from the page around it."""

import io
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator

from yoco_u.runs import Run

PALETTE = (
    ("#0072b2", "#5ab4f0"),
    ("#d55e00", "#ff8f4d"),
    ("#009e73", "#3dcca3"),
    ("#b5609a", "#e69ccb"),
    ("#a67500", "#f0c04a"),
    ("#5a5a5a", "#b4b4b4"),
)
"""Okabe and Ito's colour-blind-safe colours, for light and for dark pages; further runs use them again, dashed."""

_INK = "#0a0b0c"  # stands for the page's text colour
_POINTS = 400  # drawn of one line, at most
_numbers = count()

_Record = dict[str, Any]


def colour(index: int) -> str:
    """Of a run, for light pages; `svg` puts the page's own in its place."""
    return PALETTE[index % len(PALETTE)][0]


def dashes(index: int) -> str:
    """Line style of a run."""
    return ("-", "--", ":", "-.")[index // len(PALETTE) % 4]


def loss_plot(runs: Sequence[Run], x: str, label: str) -> str:
    """Smoothed training loss (lines) and validation loss (points) over `tokens` or `flops`."""

    def draw(axes: Axes) -> None:
        top, bottom = [], []
        for i, run in enumerate(runs):
            steps, evaluations = run.kind("train"), run.kind("evaluation")
            smooth = smoothed([step["loss"] for step in steps])
            _line(axes, i, [step[x] for step in steps], smooth, linewidth=1.2, alpha=0.75)
            points = [e["loss"] for e in evaluations]
            _line(axes, i, [e[x] for e in evaluations], points, marker="o", markersize=3.5, linewidth=0, zorder=3)
            # The first steps fall so steeply that they would hide all the rest.
            top += smooth[len(smooth) // 12 : len(smooth) // 12 + 1] + points[:1]
            bottom += [min([*smooth, *points])]
        room = 0.06 * (max(top) - min(bottom)) or 0.1
        axes.set_ylim(min(bottom) - room, max(top) + room)
        axes.xaxis.set_major_formatter(budget_formatter(x))
        axes.set_xlabel(label)
        axes.set_ylabel("loss, nats per token")

    return svg(draw)


def step_plot(runs: Sequence[Run], key: str, label: str, smooth: bool = False, log: bool = False) -> str:
    """One figure of the training steps, over steps."""

    def draw(axes: Axes) -> None:
        for i, run in enumerate(runs):
            steps = run.kind("train")
            values = [step[key] for step in steps]
            _line(axes, i, [step["step"] for step in steps], smoothed(values) if smooth else values, linewidth=1.2)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis_formatter(FuncFormatter(_plain))
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if key == "tokens_per_second" else FuncFormatter(_plain))
        axes.set_xlabel("step")
        axes.set_ylabel(label)

    return svg(draw)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the values, without the pull towards the first one."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def _line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    stride = -(-len(x) // _POINTS) or 1
    kept = sorted({*range(0, len(x), stride), len(x) - 1} - {-1})
    axes.plot([x[i] for i in kept], [y[i] for i in kept], color=colour(index), linestyle=dashes(index), **style)


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (5.2, 3.5)) -> str:
    """An `<svg>` for the middle of a page: no fonts, no identifiers shared with another plot, no address of anything.

    Args:
        size: width and height in inches at a font of 10.5 points; on the page it is as wide as there is room.
    """
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"plot {next(_numbers)}", "font.size": 10.5, **ink}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
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
    """Of an axis of `tokens` (2.5M) or `flops` (1.2e13)."""
    return EngFormatter(sep="") if x == "tokens" else FuncFormatter(_scientific)


def _scientific(value: float, _: float) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _plain(value: float, _: float) -> str:
    return f"{value:g}"
