"""What a report.json says of its runs: checked in all that can be known from it and its grid before anything is made of it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, count_runs, expand
from yoco_u.experiment.measure import Taken
from yoco_u.experiment.results import Point, RunResult, State
from yoco_u.files import checked

_Whole = Annotated[int, Field(strict=True, gt=0, lt=2**63)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]

_ROUNDED = 1e-6  # of the losses in a curve
_MEND = "restore the report from a copy, or make it anew"


class _Cell(BaseModel):
    """A run in a report."""

    cell: str
    series: str
    seed: Annotated[int, Field(strict=True)]
    state: State
    seconds: _Amount
    curve: list[tuple[_Whole, _Positive, _Amount]]
    loss_at_loops: dict[Annotated[int, Field(gt=0)], _Amount | None] = {}
    measures: Taken
    dataset: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class _Losses(BaseModel):
    """The last losses of a series in a report."""

    series: str
    loss_by_seed: dict[int, _Amount]


class _Grid(BaseModel):
    """A report of a grid without sizes, or of one of its sizes."""

    series: list[_Losses]
    cells: list[_Cell]


class _Report(_Grid):
    experiment: Experiment


class _SizesReport(BaseModel):
    experiment: Experiment
    sizes: Annotated[dict[str, _Grid], Field(min_length=1)]


def reported(report: Mapping[str, Any], source: str, folder: Path) -> tuple[Experiment, list[RunResult]]:
    """The grid of a report, and what the report says of its runs; of those sizes that it has.

    Args:
        report: the content of a report.json. Its losses have six digits, but for the last one of each run, which has all.
        source: where it came from, which errors name.
        folder: of the experiment to which the runs are to belong.

    Raises:
        UserError: if it is no report, or cannot be one of such a grid; it names the place.
    """
    if not {"experiment", "sizes"} <= report.keys() and not {"experiment", "series", "cells"} <= report.keys():
        raise UserError(f"{source}: is no report of a grid; name a report.json of `yoco-u experiment`")
    found = checked(report, _SizesReport, source) if "sizes" in report else checked(report, _Report, source)
    parts = [found] if isinstance(found, _Report) else list(found.sizes.values())
    cells, losses = [cell for part in parts for cell in part.cells], [one for part in parts for one in part.series]
    try:
        runs = _runs(found, len(cells), folder)
        results = list(_results(runs, cells, losses))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return found.experiment, results


def _runs(report: _Report | _SizesReport, cells: int, folder: Path) -> list[GridRun]:
    """The runs of the grid, which takes no longer than the report is long."""
    grid = report.experiment
    if isinstance(report, _SizesReport):
        if unknown := sorted(report.sizes.keys() - grid.sizes.keys()):
            raise UserError(f"sizes.{unknown[0]}: is no size of its grid; {_MEND}")
        grid = grid.model_copy(update={"sizes": {name: size for name, size in grid.sizes.items() if name in report.sizes}})
    elif grid.sizes:
        raise UserError(f"sizes: is missing, but its grid has sizes; {_MEND}")
    if (expected := count_runs(grid)) != cells:
        raise UserError(f"cells: it lists {cells:,} runs, but its grid has {expected:,}; {_MEND}")
    return expand(grid, folder)


def _results(runs: Sequence[GridRun], cells: Sequence[_Cell], losses: Sequence[_Losses]) -> Iterator[RunResult]:
    names = [cell.cell for cell in cells]
    _check_names("cells", names, {run.name for run in runs})
    _check_names("series", [one.series for one in losses], {run.series for run in runs})
    if len(digests := {cell.dataset for cell in cells} - {None}) > 1:
        raise UserError(f"cells: its runs were trained on {len(digests)} datasets, and a grid has one; {_MEND}")
    final = {(one.series, seed): loss for one in losses for seed, loss in one.loss_by_seed.items()}
    by_name = dict(zip(names, cells, strict=True))
    for run in runs:
        cell, loss = by_name[run.name], final.pop((run.series, run.seed), None)
        if problem := _problem(run, cell, loss):
            raise UserError(f"{run.name}: {problem}; {_MEND}")
        yield _result(run, cell, loss)
    for series, seed in final:
        raise UserError(f"{series}: loss_by_seed has seed {seed}, which is none of its grid; {_MEND}")


def _check_names(where: str, names: Sequence[str], known: set[str]) -> None:
    seen = set[str]()
    for name in names:
        if name not in known:
            raise UserError(f"{where}: {name} is none of its grid; {_MEND}")
        if name in seen:
            raise UserError(f"{where}: {name} is there twice; {_MEND}")
        seen.add(name)


def _problem(run: GridRun, cell: _Cell, loss: float | None) -> str | None:
    """What of a run cannot be; None if nothing."""
    if (cell.series, cell.seed) != (run.series, run.seed):
        return f"series and seed are {cell.series} and {cell.seed}; in its grid they are {run.series} and {run.seed}"
    for (tokens, flops, _), (more_tokens, more_flops, _) in pairwise(cell.curve):
        if more_tokens <= tokens or more_flops <= flops:
            return f"curve: the tokens or FLOPs do not rise behind {tokens:,} tokens"
    whole, step = run.config.tokens, run.config.tokens_per_step
    for tokens, _, _ in cell.curve:
        if tokens > whole or tokens % step:
            return f"curve: {tokens:,} tokens; its steps have {step:,} each, {whole:,} in all"
    if cell.state != "finished":
        return None if loss is None else f"loss_by_seed has a loss of it, but it is {cell.state}"
    if not cell.curve or cell.curve[-1][0] != whole:
        return f"curve: it is finished, but the evaluation after all {whole:,} tokens is missing"
    if loss is None:
        return "it is finished, but loss_by_seed has no loss of it"
    if abs(loss - cell.curve[-1][2]) > _ROUNDED:
        return f"the last loss of its curve is {cell.curve[-1][2]:g}, but that in loss_by_seed is {loss:g}"
    return None


def _result(run: GridRun, cell: _Cell, final: float | None) -> RunResult:
    curve = [Point(tokens, flops, loss) for tokens, flops, loss in cell.curve]
    if curve:
        last = curve.pop()
        curve.append(Point(last.tokens, last.flops, last.loss if final is None else final, cell.loss_at_loops))
    return RunResult(run, cell.state, tuple(curve), cell.seconds, cell.measures.results(), cell.dataset)
