"""What a kept report.json is good for without its runs: judging them again, and going on with the grid elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from yoco_u.config import differences
from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.results import Point, RunResult, State, results_of
from yoco_u.experiment.sizes import SizesSummary, summarize_sizes
from yoco_u.experiment.summary import Summary, summarize
from yoco_u.files import read_json


class _Cell(BaseModel):
    """A run in a report."""

    cell: str
    state: State
    seconds: float
    curve: list[tuple[int, float, float]]
    loss_at_loops: dict[int, float | None] = {}
    measures: dict[str, Any]
    dataset: str | None = None


class _Losses(BaseModel):
    """The last losses of a series in a report."""

    series: str
    loss_by_seed: dict[int, float]


def judge_again(report: Mapping[str, Any]) -> Summary | SizesSummary:
    """The summary of a report by the findings and statistics of today, as if the folders of its runs were still there.

    Args:
        report: the content of a report.json. Its losses have six digits, but for the last one of each run, which has all.

    Raises:
        KeyError: if the grid of today has a run that the report lacks.
    """
    experiment = Experiment.model_validate(report["experiment"])
    runs = [run for run in expand(experiment, Path("kept")) if not experiment.sizes or run.size in report["sizes"]]
    found = dict(_results(report, runs))
    results = results_of(tuple(found[run.name] for run in runs))
    return summarize_sizes(experiment, results) if experiment.sizes else summarize(experiment, results)


def finished_elsewhere(path: Path, experiment: Experiment, folder: Path) -> dict[str, RunResult]:
    """The runs that a report says are finished, by their names, as far as the grid has them.

    Args:
        path: report.json of this grid, of any part of its runs and seeds.
        folder: of the experiment.

    Raises:
        UserError: if the file is no report of a grid or has none of these runs finished, or one had other settings or was
            measured otherwise.
    """
    report = read_json(path, dict[str, Any])
    try:
        before = Experiment.model_validate(report["experiment"])
        found = dict(_results(report, expand(before, folder)))
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{path}: is no report of a grid; name a report.json of `yoco-u experiment`") from error
    if before.measures != experiment.measures:
        raise UserError(f"{path}: its runs were measured with {before.measures}, this grid's with {experiment.measures}")
    kept = {}
    for run in expand(experiment, folder):
        result = found.get(run.name)
        if result is None or result.state != "finished":
            continue
        for key, old, new in differences(result.run.config, run.config):
            raise UserError(f"{path}: {run.name} was trained with {key} = {old!r}, here it is {new!r}; use one of the two")
        kept[run.name] = result
    if not kept:
        raise UserError(f"{path}: no run that is finished there is one of this grid; leave it out, or give another report")
    return kept


def _results(report: Mapping[str, Any], runs: Sequence[GridRun]) -> Iterator[tuple[str, RunResult]]:
    """The results that a report has of these runs, with their names."""
    parts = list(report["sizes"].values()) if "sizes" in report else [report]
    cells = {cell.cell: cell for part in parts for cell in map(_Cell.model_validate, part["cells"])}
    losses = {found.series: found.loss_by_seed for part in parts for found in map(_Losses.model_validate, part["series"])}
    for run in runs:
        if run.name in cells:
            yield run.name, _result(run, cells[run.name], losses.get(run.series, {}).get(run.seed))


def _result(run: GridRun, cell: _Cell, final: float | None) -> RunResult:
    curve = [Point(tokens, flops, loss) for tokens, flops, loss in cell.curve]
    if curve:
        last = curve.pop()
        curve.append(Point(last.tokens, last.flops, last.loss if final is None else final, cell.loss_at_loops))
    return RunResult(run, cell.state, tuple(curve), cell.seconds, cell.measures, cell.dataset)
