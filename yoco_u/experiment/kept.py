"""Judges a kept report.json again, by the findings and statistics of today, from the curves and measures that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, expand
from yoco_u.experiment.results import Point, RunResult, results_of
from yoco_u.experiment.sizes import SizesSummary, summarize_sizes
from yoco_u.experiment.summary import Summary, summarize


def judge_again(report: Mapping[str, Any]) -> Summary | SizesSummary:
    """The summary of a report, as `--report` would make it today if the folders of the runs were still there.

    Args:
        report: the content of a report.json. Its losses have six digits, but for the last one of each run, which has all.

    Raises:
        KeyError: if the grid of today has a run that the report lacks.
    """
    experiment = Experiment.model_validate(report["experiment"])
    parts = list(report["sizes"].values()) if experiment.sizes else [report]
    cells = {cell["cell"]: cell for part in parts for cell in part["cells"]}
    finals = {
        (series["series"], int(seed)): loss
        for part in parts
        for series in part["series"]
        for seed, loss in series["loss_by_seed"].items()
    }
    runs = [run for run in expand(experiment, Path("kept")) if not experiment.sizes or run.size in report["sizes"]]
    results = results_of(tuple(_result(run, cells[run.name], finals.get((run.series, run.seed))) for run in runs))
    return summarize_sizes(experiment, results) if experiment.sizes else summarize(experiment, results)


def _result(run: GridRun, cell: Mapping[str, Any], final: float | None) -> RunResult:
    curve = [Point(tokens, flops, loss) for tokens, flops, loss in cell["curve"]]
    if curve:
        last = curve.pop()
        at_loops = {int(loops): loss for loops, loss in cell.get("loss_at_loops", {}).items()}
        curve.append(Point(last.tokens, last.flops, last.loss if final is None else final, at_loops))
    return RunResult(run, cell["state"], tuple(curve), cell["seconds"], cell["measures"])
