"""Writes the report of a grid with sizes: the gap against the size, and a report of each size in its own folder."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from yoco_u.experiment.config import Experiment
from yoco_u.experiment.findings.verdicts import loss_text, short_difference_text, trend_text
from yoco_u.experiment.report import write_report
from yoco_u.experiment.results import Cost
from yoco_u.experiment.run import REPORT
from yoco_u.experiment.sizes import GapLine, SizeGap, SizesSummary
from yoco_u.files import write_result
from yoco_u.formatting import duration, short_count
from yoco_u.plotting import colour, open_frame, save_png, svg
from yoco_u.report.page import as_yaml, render_page, write_page

_TITLES: tuple[tuple[Cost, str], ...] = (("flops", "at equal FLOPs"), ("tokens", "at equal steps"))

_GREY = 5  # its number in the palette


def write_sizes_report(summary: SizesSummary, folder: Path) -> None:
    """Write report.html, report.json and report.png into the experiment's folder, and those of each size into the size's.

    Raises:
        UserError: if something else is there.
    """
    for size, one in summary.sizes.items():
        write_report(one, folder / size)
    write_page(folder / f"{REPORT}.html", render(summary))
    write_result(folder / f"{REPORT}.json", summary.as_json())
    _write_png(summary, folder / f"{REPORT}.png")


def render(summary: SizesSummary) -> str:
    """The HTML of the page."""
    experiment, lines = summary.experiment, summary.of_cost("flops")
    return render_page(
        "sizes.html.jinja",
        title=experiment.title,
        headline=headline(summary),
        plots=[(f"YOCO-U minus YOCO {title}", gap_plot(summary.of_cost(cost))) for cost, title in _TITLES],
        legend=[(number, budget_text(experiment, line.budget)) for number, line in enumerate(lines) if line.budget is not None],
        trends=[
            (title, budget_text(experiment, line.budget), line_text(line))
            for cost, title in _TITLES
            for line in summary.of_cost(cost)
        ],
        table=[_row(gap, line, summary) for line in summary.of_cost("tokens") for gap in line.gaps],
        sizes=[(size, one.headline) for size, one in summary.sizes.items()],
        report=REPORT,
        unfinished=[(result.run.name, result.state) for result in summary.results.unfinished],
        seconds=duration(sum(result.seconds for result in summary.results.runs)),
        settings=as_yaml(experiment),
    )


def headline(summary: SizesSummary) -> str:
    """How many runs and sizes are finished, and what the gap at equal FLOPs does at the last budget."""
    runs, left = summary.results.runs, summary.results.unfinished
    whole = len(summary.experiment.sizes) - len({result.run.size for result in left})
    line = summary.of_cost("flops")[-1]
    return (
        f"{len(runs) - len(left)} of {len(runs)} runs are finished, {whole} of {len(summary.experiment.sizes)} sizes whole. "
        f"YOCO-U minus YOCO at equal FLOPs, {budget_text(summary.experiment, line.budget)}: {line_text(line)}"
    )


def budget_text(experiment: Experiment, budget: int | None) -> str:
    """40 tokens for each parameter; or 2.5M tokens"""
    if budget is None:
        return "the steps of the file"
    return f"{budget} tokens for each parameter" if experiment.tokens_per_parameter else f"{short_count(budget)} tokens"


def line_text(line: GapLine) -> str:
    """A sentence on the gap at each size, and one on its trend."""
    gaps = ", ".join(f"{short_difference_text(gap.difference)} at {gap.size}" for gap in line.gaps)
    if line.trend is None:
        return f"{gaps}; {line.reason}." if gaps else f"{line.reason}."
    return f"{gaps}. {trend_text(line.trend, line.gaps[-1].difference.mean, 'parameters')}"


def gap_plot(lines: Sequence[GapLine]) -> str:
    """The gap over the parameters, with its 95% intervals, as SVG: a line for each budget."""
    return svg(lambda axes: _draw(axes, lines))


def _write_png(summary: SizesSummary, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=130)
    for axes, (cost, title) in zip(figure.subplots(1, 2, sharey=True), _TITLES, strict=True):
        lines = summary.of_cost(cost)
        _draw(axes, lines)
        axes.set_title(title, fontsize=10)
        open_frame(axes, grid=0.2)
        if len(lines) > 1:
            axes.legend([budget_text(summary.experiment, line.budget) for line in lines], frameon=False, fontsize=9)
    save_png(figure, path)


def _draw(axes: Axes, lines: Sequence[GapLine]) -> None:
    axes.set_xscale("log")
    ticks = {gap.looped.parameters: gap.size for line in lines for gap in line.gaps}
    for number, line in enumerate(lines):
        x, means = [gap.looped.parameters for gap in line.gaps], [gap.difference.mean for gap in line.gaps]
        axes.plot(x, means, color=colour(number), marker="o", markersize=4.5, linewidth=1.2)
    for number, line in enumerate(lines):
        for gap in line.gaps:
            if gap.difference.low is not None and gap.difference.high is not None:
                x = [gap.looped.parameters] * 2
                axes.plot(x, [gap.difference.low, gap.difference.high], color=colour(number), linewidth=1.5)
    axes.axhline(0, color=colour(_GREY), linewidth=0.8)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel("YOCO-U minus YOCO, nats per token")


def _row(gap: SizeGap, line: GapLine, summary: SizesSummary) -> list[str]:
    """A row of the table: a size at a budget, at equal steps, and at equal FLOPs where that YOCO is finished too."""
    at_flops = next(other for other in summary.of_cost("flops") if other.budget == line.budget)
    flops = next((other for other in at_flops.gaps if other.size == gap.size), None)
    return [
        gap.size,
        short_count(gap.looped.parameters),
        short_count(gap.looped.tokens),
        f"{gap.looped.tokens / gap.looped.parameters:.0f}",
        str(gap.difference.count),
        loss_text(gap.looped.loss),
        loss_text(gap.plain.loss),
        short_difference_text(gap.difference),
        "" if flops is None else loss_text(flops.plain.loss),
        "" if flops is None else short_difference_text(flops.difference),
    ]
