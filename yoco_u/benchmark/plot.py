"""The curves of a benchmark as a PNG: prefill, decode and memory over the context."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from yoco_u.benchmark.results import Row
from yoco_u.benchmark.table import context_label
from yoco_u.files import beside, publish

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5609a", "#a67500", "#5a5a5a", "#56b4e9", "#8c564b")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """One line an engine: prefill tokens/s, decode tokens/s of the smallest and (dashed) the largest batch, peak memory of the
    prefill. Both axes are logarithmic; cases without figures leave gaps."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    decodes = [row for row in rows if row.kind == "decode"]
    prefills = [row for row in rows if row.kind == "prefill"]
    batches = sorted({row.batch for row in decodes})
    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=150)
    left, middle, right = figure.subplots(1, 3)
    for number, engine in enumerate(engines):
        colour, own = COLOURS[number % len(COLOURS)], [row for row in prefills if row.engine == engine]
        _line(left, [(row.context, row.tokens_per_second) for row in own], colour, engine)
        _line(right, [(row.context, row.peak_bytes and row.peak_bytes / 2**20) for row in own], colour, engine)
        for batch in {*batches[:1], *batches[-1:]}:
            shown = [row for row in decodes if row.engine == engine and row.batch == batch]
            label = engine if batch == batches[0] else ""
            _line(middle, [(row.context, row.tokens_per_second) for row in shown], colour, label, dashed=batch != batches[0])
    left.set_title("prefill, tokens/s")
    dashed = f", dashed: {batches[-1]}" if len(batches) > 1 else ""
    middle.set_title(f"decode, tokens/s, batch {batches[0]}{dashed}" if batches else "decode")
    right.set_title("peak memory of a prefill, MiB")
    for axes in (left, middle, right):
        _finish(axes, sorted({row.context for row in rows}))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(beside(path), format="png")
    publish(path)


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], colour: str, label: str, dashed: bool = False) -> None:
    x = [context for context, _ in points]
    y = [float("nan") if value is None else value for _, value in points]
    axes.plot(x, y, color=colour, label=label, marker="o", markersize=3.5, linewidth=1.5, linestyle="--" if dashed else "-")


def _finish(axes: Axes, contexts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_label(round(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("context, tokens")
    axes.grid(alpha=0.2, which="both")
    axes.spines[["top", "right"]].set_visible(False)
