"""Writes the report of a grid: an HTML page, the summary as JSON, and the plots as one picture."""

from pathlib import Path

from yoco_u.experiment.findings.verdicts import loss_text, no_interval, short_difference_text
from yoco_u.experiment.needle_maps import needle_maps
from yoco_u.experiment.plots import (
    AXES,
    angular_plot,
    budget_plot,
    curve_plot,
    final_plot,
    loops_plot,
    needle_plot,
    styles,
    task_plot,
    write_png,
)
from yoco_u.experiment.results import Cost
from yoco_u.experiment.run import REPORT
from yoco_u.experiment.summary import Fit, Summary
from yoco_u.experiment.task_curves import TaskCurves, task_curves
from yoco_u.files import write_result
from yoco_u.formatting import duration, scientific, short_count
from yoco_u.plotting import PALETTE, css_dashes
from yoco_u.report.page import as_yaml, render_page, write_page


def write_report(summary: Summary, folder: Path) -> None:
    """Write report.html, report.json and report.png into the experiment's folder.

    Raises:
        UserError: if something else is there.
    """
    write_page(folder / f"{REPORT}.html", render(summary))
    write_result(folder / f"{REPORT}.json", summary.as_json())
    write_png(summary, folder / f"{REPORT}.png")


def render(summary: Summary) -> str:
    """The HTML of the page."""
    series, numbers = summary.results.series, styles(summary.results.series)
    return render_page(
        "experiment.html.jinja",
        title=summary.experiment.title,
        headline=summary.headline,
        findings=[(j.outcome.verdict, j.finding.statement, j.outcome.text, bool(j.outcome.numbers)) for j in summary.judged],
        styles=[{"colour": number % len(PALETTE), "dash": css_dashes(number)} for number in numbers.values()],
        legend=[(numbers[s.model], s.model_label) for s in {s.model: s for s in series}.values()],
        curve_plots=[(f"Loss against {_unit(x)}", curve_plot(series, x, label)) for x, label in AXES],
        final_plot=final_plot(summary.rows, numbers),
        budget_plots=[(f"Final loss against {_unit(x)}", budget_plot(series, summary.fits, x, label)) for x, label in AXES]
        if summary.several_budgets
        else [],
        loops_plot=loops_plot(series),
        angular_plot=angular_plot(series),
        needle_maps=[(needles.title, needle_plot(needles)) for needles in needle_maps(series)],
        tasks=[(tasks, task_plot(tasks, numbers), _task_table(tasks)) for tasks in task_curves(series)],
        baseline=summary.baseline,
        table=[
            [
                row.series.label,
                short_count(row.series.parameters),
                str(row.series.loops),
                short_count(row.series.tokens),
                f"{row.series.tokens / row.series.parameters:.0f}",
                scientific(row.series.flops),
                str(len(row.series.curves)),
                loss_text(row.loss),
                "" if row.difference is None else short_difference_text(row.difference),
            ]
            for row in summary.rows
        ],
        fits=[(fit.label, _unit(fit.x), _fit_text(fit)) for fit in summary.fits] if summary.several_budgets else [],
        unfinished=[(result.run.name, result.state) for result in summary.results.unfinished],
        seconds=duration(sum(result.seconds for result in summary.results.runs)),
        settings=as_yaml(summary.experiment),
    )


def _task_table(tasks: TaskCurves) -> list[list[str]]:
    return [
        [
            curve.series.label,
            *(f"{curve.mean(level):.0%}" if level in curve.shares else "" for level in tasks.levels),
            f"{curve.overall:.1%}",
        ]
        for curve in tasks.curves
    ]


def _unit(x: Cost) -> str:
    return "FLOPs" if x == "flops" else x


def _fit_text(fit: Fit) -> str:
    laws = fit.law
    if laws is None:
        return str(fit.reason)
    floor, exponent = laws.floor, laws.exponent
    if floor.low is None or floor.high is None or exponent.low is None or exponent.high is None:
        bounds = no_interval(floor)
    else:
        bounds = (
            f"95%: floor {floor.low:.3f} to {floor.high:.3f}, exponent {exponent.low:.3f} to {exponent.high:.3f}, over "
            f"{floor.count} seeds"
        )
    residual = max(law.residual for law in laws.by_seed.values())
    return (
        f"floor {floor.mean:.3f}, exponent {exponent.mean:.3f} ({bounds}; {laws.budgets} budgets of each, residual up to "
        f"{residual:.4f} nats)"
    )
