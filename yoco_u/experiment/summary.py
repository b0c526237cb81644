"""The summary of a grid: everything that its report shows, and the same as JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from yoco_u.experiment.config import Experiment
from yoco_u.experiment.findings.claims import Judged, judge
from yoco_u.experiment.findings.verdicts import Verdict
from yoco_u.experiment.intervals import Interval, NotDecidable, PowerLaws, difference, fit_power_laws
from yoco_u.experiment.results import Cost, Results, Series, best
from yoco_u.report.comparison import equal_cost
from yoco_u.version import __version__


@dataclass(frozen=True)
class Row:
    """A row of the report's table: a series, beside the baseline's series of equal tokens.

    Attributes:
        loss: final validation loss.
        difference: the series' final loss minus the baseline's, paired by seed; None for the baseline itself, and where it has
            no series of equal tokens or no seed in common.
    """

    series: Series
    loss: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Fit:
    """Power laws through the final losses of one model at several budgets, one for each seed.

    Attributes:
        model, label: name of the model, and its name in tables and plots.
        x: what the budgets are counted in.
        law: the power laws; None if the runs do not suffice for them.
        reason: why there is no power law; None if there is one.
    """

    model: str
    label: str
    x: Cost
    law: PowerLaws | None
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """What the report of a grid shows.

    Attributes:
        baseline: label of the model that all rows are compared with; None if no run is finished.
        rows: all series, the lowest loss first.
        fits: power laws of every model, over tokens and over FLOPs.
        judged: all findings with their verdicts.
    """

    experiment: Experiment
    results: Results
    baseline: str | None
    rows: list[Row]
    fits: list[Fit]
    judged: list[Judged]

    @property
    def several_budgets(self) -> bool:
        """Whether the first model was trained on several numbers of tokens."""
        series = self.results.series
        return len({s.tokens for s in series if s.model == series[0].model}) > 1

    @property
    def headline(self) -> str:
        """How many runs are finished, and how many of the findings that the grid can speak about have which verdict."""
        runs, left = self.results.runs, self.results.unfinished
        seeds = len({result.run.seed for result in runs})
        done = f"{len(runs) - len(left)} of {len(runs)} runs are finished, {seeds} seed{'s' if seeds > 1 else ''}."
        counted = Counter(judged.outcome.verdict for judged in self.judged if judged.outcome.numbers)
        told = ", ".join(f"{counted[verdict]} {verdict}" for verdict in get_args(Verdict) if counted[verdict])
        return f"{done} Of the findings that this grid can speak about: {told}." if told else done

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "title": self.experiment.title,
            "version": __version__,
            "experiment": self.experiment.model_dump(mode="json"),
            "baseline": self.baseline,
            "findings": [
                {"id": j.finding.id, "statement": j.finding.statement, "needs": j.finding.needs} | asdict(j.outcome)
                for j in self.judged
            ],
            "series": [_series_json(row) for row in self.rows],
            "fits": [asdict(fit) for fit in self.fits],
            "cells": [
                {
                    "cell": result.run.name,
                    "series": result.run.series,
                    "seed": result.run.seed,
                    "state": result.state,
                    "seconds": round(result.seconds, 1),
                    "curve": [[point.tokens, point.flops, round(point.loss, 6)] for point in result.curve],
                    "loss_at_loops": result.curve[-1].at_loops if result.curve else {},
                    "measures": result.measures,
                }
                | ({} if result.dataset is None else {"dataset": result.dataset})
                for result in self.results.runs
            ],
        }


def summarize(experiment: Experiment, results: Results) -> Summary:
    """Judge the findings, fit the power laws, and compare every series with the baseline."""
    base = _baseline(results.series)
    rows = [_row(series, base) for series in sorted(results.series, key=lambda series: series.loss.mean)]
    label = base[0].model_label if base else None
    return Summary(experiment, results, label, rows, _fits(results.series), judge(results))


def _baseline(found: Sequence[Series]) -> list[Series]:
    """The series of the model that all others are compared with, one for each number of tokens.

    That is the YOCO that is best at the fewest tokens, or the first model where there is no YOCO.
    """
    yoco = [series for series in found if series.role == "yoco"]
    chosen = (
        best([series for series in yoco if series.tokens == min(y.tokens for y in yoco)]) if yoco else next(iter(found), None)
    )
    return [series for series in found if chosen is not None and series.model == chosen.model]


def _row(series: Series, base: Sequence[Series]) -> Row:
    other = next((b for b in base if equal_cost(b.tokens, series.tokens) and b is not series), None)
    try:
        found = difference(series.final, other.final) if other and series not in base else None
    except NotDecidable:
        found = None
    return Row(series, series.loss, found)


def _fits(found: Sequence[Series]) -> list[Fit]:
    fits = []
    for model in dict.fromkeys(series.model for series in found):
        own = [series for series in found if series.model == model]
        for x in get_args(Cost):
            points: dict[int, list[tuple[float, float]]] = {}
            for series in own:
                for seed, loss in series.final.items():
                    points.setdefault(seed, []).append((getattr(series, x), loss))
            law, reason = None, None
            try:
                law = fit_power_laws(points)
            except NotDecidable as why:
                reason = str(why)
            fits.append(Fit(model, own[0].model_label, x, law, reason))
    return fits


def _series_json(row: Row) -> dict[str, Any]:
    series = row.series
    return {
        "series": series.name,
        "model": series.model,
        "label": series.label,
        "role": series.role,
        "loops": series.loops,
        "parameters": series.parameters,
        "tokens": series.tokens,
        "flops": series.flops,
        "loss_by_seed": series.final,
        "loss": asdict(row.loss),
        "minus_baseline": None if row.difference is None else asdict(row.difference),
    }
