"""Everything that a report shows of a grid, and the JSON of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from yoco_u.experiment.config import Experiment
from yoco_u.experiment.findings.claims import Judged, judge
from yoco_u.experiment.findings.verdicts import Verdict
from yoco_u.experiment.intervals import Interval, NotDecidable, PowerLaw, difference, fit_power_law
from yoco_u.experiment.results import Results, Series, best, near
from yoco_u.version import __version__


@dataclass(frozen=True)
class Row:
    """A series beside the baseline of equal tokens.

    Attributes:
        difference: its loss minus the baseline's, paired by seed; None for the baseline and without one.
    """

    series: Series
    loss: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Fit:
    """A power law through the final losses of one model at several budgets.

    Attributes:
        law: None if there is none, for the `reason`.
    """

    model: str
    label: str
    x: Literal["tokens", "flops"]
    law: PowerLaw | None
    reason: str | None


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        baseline: label of the model that the rows are compared with.
        rows: lowest loss first.
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
        """How far the grid is, and how the findings that it was made for came out."""
        runs, left = self.results.runs, self.results.unfinished
        seeds = len({result.run.seed for result in runs})
        done = f"{len(runs) - len(left)} of {len(runs)} runs are finished, {seeds} seed{'s' if seeds > 1 else ''}."
        counted = Counter(judged.outcome.verdict for judged in self.judged if judged.outcome.numbers)
        told = ", ".join(f"{counted[verdict]} {verdict}" for verdict in get_args(Verdict) if counted[verdict])
        return f"{done} Of the findings that this grid can speak about: {told}." if told else done

    def as_json(self) -> dict[str, Any]:
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
                    "measures": result.measures,
                }
                for result in self.results.runs
            ],
        }


def summarize(experiment: Experiment, results: Results) -> Summary:
    base = _baseline(results.series)
    rows = [_row(series, base) for series in sorted(results.series, key=lambda series: series.loss.mean)]
    label = base[0].model_label if base else None
    return Summary(experiment, results, label, rows, _fits(results.series), judge(results))


def _baseline(found: Sequence[Series]) -> list[Series]:
    """The series of the best YOCO, or else of the first model, one for each number of tokens."""
    yoco = [series for series in found if series.role == "yoco"]
    chosen = (
        best([series for series in yoco if series.tokens == min(y.tokens for y in yoco)]) if yoco else next(iter(found), None)
    )
    return [series for series in found if chosen is not None and series.model == chosen.model]


def _row(series: Series, base: Sequence[Series]) -> Row:
    other = next((b for b in base if near(b.tokens, series.tokens) and b is not series), None)
    try:
        found = difference(series.final, other.final) if other and series not in base else None
    except NotDecidable:
        found = None
    return Row(series, series.loss, found)


def _fits(found: Sequence[Series]) -> list[Fit]:
    fits = []
    for model in dict.fromkeys(series.model for series in found):
        own = [series for series in found if series.model == model]
        for x in ("tokens", "flops"):
            points = [(getattr(series, x), loss) for series in own for loss in series.final.values()]
            law, reason = None, None
            try:
                law = fit_power_law([at for at, _ in points], [loss for _, loss in points])
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
