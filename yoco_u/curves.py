"""Curves over the context as a PNG, panels side by side, over a logarithmic axis."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from yoco_u.files import beside, publish
from yoco_u.labels import context_label

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5609a", "#a67500", "#5a5a5a", "#56b4e9", "#8c564b")


class ContextPlot:
    """Panels by title, and one legend for all of them.

    Args:
        x_label: of the axis of contexts.
        logarithmic: whether values are shown on a logarithmic axis too.

    Attributes:
        axes: of each panel.
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
        """Curve number `index` through (context, value); None leaves a gap. Lines without a label are not in the legend."""
        x = [context for context, _ in points]
        y = [float("nan") if value is None else value for _, value in points]
        colour = COLOURS[index % len(COLOURS)]
        self.axes[panel].plot(x, y, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.5, linestyle=style)

    def write(self, path: Path, contexts: Sequence[int]) -> None:
        """Label the axes, with ticks at `contexts`, and save."""
        for axes in self.axes:
            _finish(axes, contexts, self.logarithmic)
            axes.set_xlabel(self.x_label)
        handles, labels = self.axes[0].get_legend_handles_labels()
        columns = min(len(labels), 8 * len(self.axes) // 3)
        self.figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        self.figure.savefig(beside(path), format="png")
        publish(path)


def _finish(axes: Axes, contexts: Sequence[int], logarithmic: bool) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_label(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(alpha=0.2, which="both")
    axes.spines[["top", "right"]].set_visible(False)
