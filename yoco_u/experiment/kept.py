"""What a kept report.json is good for without its runs: judging them again, and going on with the grid elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from yoco_u.config import differences
from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import expand
from yoco_u.experiment.report_file import reported
from yoco_u.experiment.results import RunResult, results_of
from yoco_u.experiment.sizes import SizesSummary, summarize_sizes
from yoco_u.experiment.summary import Summary, summarize
from yoco_u.files import read_json


def judge_again(report: Mapping[str, Any], source: str = "the report") -> Summary | SizesSummary:
    """The summary of a report by the findings and statistics of today, as if the folders of its runs were still there.

    Args:
        report: the content of a report.json. Its losses have six digits, but for the last one of each run, which has all.
        source: where it came from, which errors name.

    Raises:
        UserError: if it is no report, or cannot be one of such a grid; it names the place.
    """
    experiment, found = reported(report, source, Path("kept"))
    results = results_of(tuple(found))
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
    before, results = reported(read_json(path, dict[str, Any]), str(path), folder)
    if before.measures != experiment.measures:
        raise UserError(f"{path}: its runs were measured with {before.measures}, this grid's with {experiment.measures}")
    found = {result.run.name: replace(result, report=path) for result in results if result.state == "finished"}
    kept = {}
    for run in expand(experiment, folder):
        result = found.get(run.name)
        if result is None:
            continue
        for key, old, new in differences(result.run.config, run.config):
            raise UserError(f"{path}: {run.name} was trained with {key} = {old!r}, here it is {new!r}; use one of the two")
        kept[run.name] = result
    if not kept:
        raise UserError(f"{path}: no run that is finished there is one of this grid; leave it out, or give another report")
    return kept
