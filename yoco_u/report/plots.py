"""Plots of runs as SVG: losses over tokens and FLOPs, and values of the training steps."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator

from yoco_u.plotting import budget_formatter, colour, dashes, has_positive, svg, with_room
from yoco_u.training.run_folder import Run

_POINTS = 400  # a line is drawn through at most about this many points


def loss_plot(runs: Sequence[Run], x: str, label: str) -> str:
    """Smoothed training loss (lines) and validation loss (points) over `x`, a key of the records: `tokens` or `flops`.

    Only the points are drawn of runs whose steps have another loss than that of text.
    """

    def draw(axes: Axes) -> None:
        top, bottom = [], []
        for i, run in enumerate(runs):
            steps, evaluations = run.kind("train") if run.config.loss_is_of_text else [], run.kind("evaluation")
            smooth = smoothed([step["loss"] for step in steps])
            _line(axes, i, [step[x] for step in steps], smooth, linewidth=1.2, alpha=0.75)
            points = [e["loss"] for e in evaluations]
            _line(axes, i, [e[x] for e in evaluations], points, marker="o", markersize=3.5, linewidth=0, zorder=3)
            # The loss of the first twelfth of the steps falls too steeply to be shown on one scale with the rest.
            top += smooth[len(smooth) // 12 : len(smooth) // 12 + 1] + points[:1]
            bottom += [*smooth, *points]
        if bottom:
            axes.set_ylim(*with_room(min(bottom), max(top)))
        axes.xaxis.set_major_formatter(budget_formatter(x))
        axes.set_xlabel(label)
        axes.set_ylabel("loss, nats per token")

    return svg(draw)


def step_plot(runs: Sequence[Run], key: str, label: str, smooth: bool = False, log: bool = False) -> str:
    """One value of the training steps, over the steps.

    Args:
        key: the value's key in the records.
        smooth: whether a moving average is drawn.
        log: whether the axis of values is logarithmic.
    """

    def draw(axes: Axes) -> None:
        for i, run in enumerate(runs):
            steps = run.kind("train")
            values = [step[key] for step in steps]
            _line(axes, i, [step["step"] for step in steps], smoothed(values) if smooth else values, linewidth=1.2)
        if log and has_positive(axes):
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
    """Exponential moving average over about a fiftieth of the values.

    The weights are normalised, so the first value does not pull on those that follow.
    """
    decay = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        result.append(total / weight)
    return result


def _line(axes: Axes, index: int, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw evenly spaced points of a line, the last one included, in the colour and line style of run `index`."""
    stride = -(-len(x) // _POINTS) or 1
    kept = sorted({*range(0, len(x), stride), len(x) - 1} - {-1})
    axes.plot([x[i] for i in kept], [y[i] for i in kept], color=colour(index), linestyle=dashes(index), **style)


def _plain(value: float, _: float) -> str:
    return f"{value:g}"
