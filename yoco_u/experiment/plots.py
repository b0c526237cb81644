"""Plots of a grid: mean curves with the range of the seeds, final losses with their intervals, losses over budgets, needles."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from yoco_u.evaluation.plots import heat_map
from yoco_u.experiment.needle_maps import NeedleMap, needle_maps
from yoco_u.experiment.results import Cost, Series
from yoco_u.experiment.summary import Fit, Row, Summary
from yoco_u.experiment.task_curves import TaskCurves, task_curves
from yoco_u.plotting import budget_formatter, colour, dashes, open_frame, plain, save_png, svg, with_room

AXES: tuple[tuple[Cost, str], ...] = (("tokens", "training tokens"), ("flops", "training FLOPs"))
"""What losses are drawn over, with the label of that axis."""

_MAPS_IN_A_ROW = 4
_TASKS_IN_A_ROW = 3

_SHOWN_ABOVE = 1.0  # nats above the lowest loss; a model far from its own loop count may be much worse


def styles(found: Sequence[Series]) -> dict[str, int]:
    """A number for each model, in the order of the series, which chooses its colour and line style."""
    return {model: number for number, model in enumerate(dict.fromkeys(series.model for series in found))}


def curve_plot(found: Sequence[Series], x: Cost, label: str) -> str:
    """Validation loss over tokens or FLOPs, as SVG: mean over the seeds, and a shade from the lowest to the highest."""
    return svg(lambda axes: _draw_curves(axes, found, x, label))


def final_plot(rows: Sequence[Row], numbers: dict[str, int]) -> str:
    """Final losses as SVG, the lowest on top, with their 95% intervals and each seed."""
    return svg(lambda axes: _draw_finals(axes, rows, numbers), (7.5, _height(rows)))


def budget_plot(found: Sequence[Series], fits: Sequence[Fit], x: Cost, label: str) -> str:
    """Final losses over the budgets of the runs, as SVG, with the power laws; without a law, a thin line joins the means."""
    return svg(lambda axes: _draw_budgets(axes, found, fits, x, label))


def angular_plot(found: Sequence[Series]) -> str | None:
    """Angular distance of each unrolled layer, mean over the seeds, as SVG; None if it was not measured."""
    numbers = styles(found)
    measured = [series for series in found if any("angular" in taken for taken in series.measures.values())]

    def draw(axes: Axes) -> None:
        for series in measured:
            rows = [taken["angular"]["layers"] for taken in series.measures.values() if "angular" in taken]
            number = numbers[series.model]
            line, x = dashes(number), range(1, len(rows[0]) + 1)
            axes.plot(x, np.mean(rows, axis=0), color=colour(number), linestyle=line, marker="o", markersize=3, linewidth=1.2)
        axes.set_xlabel("layer, unrolled")
        axes.set_ylabel("angular distance, half turns")

    return svg(draw, (7.5, 3.5)) if measured else None


def loops_plot(found: Sequence[Series]) -> str | None:
    """Final loss against the loops run, as SVG; None if no series was evaluated at other loop counts than its own."""
    return svg(lambda axes: _draw_loops(axes, found), (7.5, 3.5)) if _at_several_loops(found) else None


def needle_plot(needles: NeedleMap) -> str:
    """Recall at each depth and length, as SVG."""
    return svg(lambda axes: _draw_needles(axes, needles), (3.6, 2.6))


def task_plot(tasks: TaskCurves, numbers: dict[str, int]) -> str:
    """Right answers over the level, as SVG: the mean over the seeds of each model."""
    return svg(lambda axes: _draw_tasks(axes, tasks, numbers))


def write_png(summary: Summary, path: Path) -> None:
    """Write one picture: curves, final losses (over budgets, if there are several), losses over loops, needles, tasks."""
    series = summary.results.series
    maps, tasks, loops = needle_maps(series), task_curves(series), _at_several_loops(series)
    rows, task_rows = -(-len(maps) // _MAPS_IN_A_ROW), -(-len(tasks) // _TASKS_IN_A_ROW)
    heights = [4.6, 3.6 if summary.several_budgets else _height(summary.rows)]
    heights += [3.6] * loops + [2.6 * rows] * bool(maps) + [3.4 * task_rows] * bool(tasks)
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", dpi=130)
    parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(1, 2)
    for axes, (x, label) in zip(panels, AXES, strict=True):
        _draw_curves(axes, series, x, label)
    parts[0].legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    if summary.several_budgets:
        for axes, (x, label) in zip(parts[1].subplots(1, 2), AXES, strict=True):
            _draw_budgets(axes, series, summary.fits, x, label)
    else:
        _draw_finals(parts[1].subplots(), summary.rows, styles(series))
    if loops:
        _draw_loops(parts[2].subplots(), series)
    if tasks:
        grid = parts[-1].subplots(task_rows, _TASKS_IN_A_ROW, squeeze=False).ravel()
        for axes, one in zip(grid, tasks, strict=False):
            _draw_tasks(axes, one, styles(series))
            axes.set_title(one.task, fontsize=10)
        for axes in grid[len(tasks) :]:
            axes.remove()
    for axes in figure.axes:
        open_frame(axes, grid=0.2)
    if maps:
        parts[2 + loops].suptitle("needles found", fontsize=10)
        grid = parts[2 + loops].subplots(rows, _MAPS_IN_A_ROW, squeeze=False).ravel()
        for axes, needles in zip(grid, maps, strict=False):
            _draw_needles(axes, needles)
            axes.set_title(plain(fill(needles.title, 28)), fontsize=9)
        for axes in grid[len(maps) :]:
            axes.remove()
    save_png(figure, path)


def _height(rows: Sequence[Row]) -> float:
    """Inches that a plot of final losses needs."""
    return 0.8 + 0.3 * len(rows)


def _draw_finals(axes: Axes, rows: Sequence[Row], numbers: dict[str, int]) -> None:
    for height, row in enumerate(reversed(rows)):
        own = colour(numbers[row.series.model])
        if row.loss.low is not None and row.loss.high is not None:
            axes.plot([row.loss.low, row.loss.high], [height, height], color=own, linewidth=1.5)
        axes.plot([row.loss.mean], [height], color=own, marker="o", markersize=5)
        seeds = list(row.series.final.values())
        axes.plot(seeds, [height] * len(seeds), color=own, marker="|", markersize=9, linewidth=0)
    axes.set_yticks(range(len(rows)), [plain(row.series.label) for row in reversed(rows)])
    axes.set_xlabel("final validation loss, nats per token")


def _draw_budgets(axes: Axes, found: Sequence[Series], fits: Sequence[Fit], x: Cost, label: str) -> None:
    axes.set_xscale("log")
    for model, number in styles(found).items():
        own = sorted((series for series in found if series.model == model), key=lambda series: series.tokens)
        budgets = [getattr(series, x) for series in own]
        law = next((fit.law for fit in fits if fit.model == model and fit.x == x), None)
        for series, budget in zip(own, budgets, strict=True):
            seeds = list(series.final.values())
            axes.plot([budget] * len(seeds), seeds, color=colour(number), marker="o", markersize=3.5, linewidth=0)
        if law is not None:
            between = np.geomspace(budgets[0], 2 * budgets[-1], 60)
            axes.plot(between, [law(value) for value in between], color=colour(number), linestyle=dashes(number), linewidth=1.2)
        else:
            means = [series.loss.mean for series in own]
            axes.plot(budgets, means, color=colour(number), linestyle=dashes(number), linewidth=0.8, alpha=0.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(budget_formatter(x))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.set_ylabel("final loss, nats per token")


def _draw_curves(axes: Axes, found: Sequence[Series], x: Cost, label: str) -> None:
    numbers, drawn, top, bottom = styles(found), set[str](), [], []
    for series in found:
        curves = list(series.curves.values())
        points = [getattr(point, x) for point in curves[0]]
        losses = np.array([np.interp(points, [getattr(p, x) for p in curve], [p.loss for p in curve]) for curve in curves])
        number = numbers[series.model]
        mean = losses.mean(axis=0)
        legend = plain(series.model_label) if series.model not in drawn else None
        drawn.add(series.model)
        axes.fill_between(points, losses.min(axis=0), losses.max(axis=0), color=colour(number), alpha=0.18, linewidth=0)
        axes.plot(points, mean, color=colour(number), linestyle=dashes(number), linewidth=1.3, label=legend)
        top.append(float(mean[len(mean) // 8]))  # the first eighth falls too steeply to be shown on one scale with the rest
        bottom.append(float(losses.min()))
    axes.set_ylim(*with_room(min(bottom), max(top)))
    axes.xaxis.set_major_formatter(budget_formatter(x))
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per token")


def _at_several_loops(found: Sequence[Series]) -> bool:
    return any(series.evaluated_at > {series.loops} for series in found)


def _draw_loops(axes: Axes, found: Sequence[Series]) -> None:
    """A line for each model over the loop counts at which no seed's loss is infinite, and a larger point at its own."""
    numbers, shown = styles(found), list[float]()
    for series in found:
        losses, own = {loops: series.at_loops(loops) for loops in sorted(series.evaluated_at)}, colour(numbers[series.model])
        means = {loops: float(np.mean([*by.values()])) for loops, by in losses.items() if by.keys() == series.curves.keys()}
        axes.plot([*means], [*means.values()], color=own, linestyle=dashes(numbers[series.model]), marker=".", linewidth=1.2)
        axes.plot([series.loops], [means[series.loops]], color=own, marker="o", markersize=6)
        shown += means.values()
    low, high = with_room(min(shown), max(shown))
    axes.set_ylim(low, min(high, min(shown) + _SHOWN_ABOVE))
    axes.set_xlabel("loops run")
    axes.set_ylabel("final loss, nats per token")


def _draw_needles(axes: Axes, needles: NeedleMap) -> None:
    axes.grid(False)
    heat_map(axes, needles.recall, needles.lengths, needles.depths)


def _draw_tasks(axes: Axes, tasks: TaskCurves, numbers: dict[str, int]) -> None:
    for curve in tasks.curves:
        own, levels = colour(numbers[curve.series.model]), list(curve.shares)
        line = dashes(numbers[curve.series.model])
        axes.plot(levels, list(map(curve.mean, levels)), color=own, linestyle=line, marker="o", markersize=3, linewidth=1.3)
    axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(tasks.counts)
    axes.set_ylabel("right answers")
