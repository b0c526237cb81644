"""The results of a grid: the validation curve of every run, and series of runs that differ in nothing but their seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from yoco_u.budget import parameters
from yoco_u.errors import UserError
from yoco_u.experiment.config import Role
from yoco_u.experiment.grid import GridRun
from yoco_u.experiment.intervals import Interval, NotDecidable, interval
from yoco_u.experiment.measure import read_measures
from yoco_u.experiment.run import check_one_dataset, dataset_of, has_diverged, is_finished
from yoco_u.regular_files import check_regular
from yoco_u.report.comparison import equal_cost
from yoco_u.training.metrics import METRICS, loops_key
from yoco_u.training.run_folder import RunFolder, read_run

State = Literal["finished", "unfinished", "diverged", "not begun"]

Cost = Literal["tokens", "flops"]
"""What a training spends: tokens of text, or model FLOPs."""


@dataclass(frozen=True)
class Point:
    """One evaluation on the validation split.

    Attributes:
        tokens, flops: training tokens, and model FLOPs of training, up to this evaluation.
        loss: nats per token.
        at_loops: the loss at the loop counts T that `training.evaluate_loops` names; None where it is not finite.
    """

    tokens: int
    flops: float
    loss: float
    at_loops: dict[int, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What the folder of a run of the grid says.

    Attributes:
        curve: all evaluations so far, in their order.
        seconds: time of training so far.
        measures: results by the name of the measure, see `yoco_u.experiment.measure`.
        dataset: digest of the dataset that it was trained on; None where that was not noted.
        report: the file of the report that says so; None where the run has a folder.
    """

    run: GridRun
    state: State
    curve: tuple[Point, ...]
    seconds: float
    measures: dict[str, Any]
    dataset: str | None = None
    report: Path | None = None

    @property
    def final(self) -> Point:
        """The last evaluation."""
        return self.curve[-1]


@dataclass(frozen=True)
class Series:
    """The finished runs, at least one, that differ in nothing but their seeds.

    Attributes:
        name, label: name of the series, and its name in tables and plots.
        model, model_label: name of the model, and its name in tables and plots.
        role: what the model stands for in the paper's findings; None for nothing.
        size: the value on the axis of sizes; None without that axis.
        budget: the value on the axis of tokens, or of tokens per parameter; None without that axis.
        loops: the largest loop count of a stage.
        gated: whether a looped stage has gates.
        parameters: parameter count of the model.
        tokens, flops: training tokens and model FLOPs of each run.
        curves: evaluations of each run, by seed.
        layers: number of layers of each stage, before looping.
        unrolled_layers: number of layers of all stages, each counted as often as it is looped.
        measures: results by seed, then by the name of the measure.
        chosen_from: how many series of its role and cost it was chosen from by its loss, itself included.
    """

    name: str
    label: str
    model: str
    model_label: str
    role: Role | None
    size: str | None
    budget: int | None
    loops: int
    gated: bool
    parameters: int
    tokens: int
    flops: float
    curves: dict[int, tuple[Point, ...]]
    layers: tuple[int, ...]
    unrolled_layers: int
    measures: dict[int, dict[str, Any]]
    chosen_from: int = 1

    @property
    def final(self) -> dict[int, float]:
        """The last validation loss by seed."""
        return {seed: curve[-1].loss for seed, curve in self.curves.items()}

    @property
    def loss(self) -> Interval:
        """The last validation loss: its mean over the seeds, with the interval."""
        return interval(list(self.final.values()))

    @property
    def needles(self) -> list[dict[str, Any]]:
        """The scores of `yoco_u.evaluation.needle_grid`, of all seeds; empty if they were not measured."""
        return [score for taken in self.measures.values() for score in taken.get("needles", [])]

    @property
    def evaluated_at(self) -> set[int]:
        """The loop counts at which every run was evaluated at its end, the series' own included."""
        return set.intersection(*({self.loops, *curve[-1].at_loops} for curve in self.curves.values()))

    def at_loops(self, loops: int) -> dict[int, float]:
        """The last validation loss at a loop count, by seed, of the runs that were evaluated at it, where it is finite."""
        if loops == self.loops:
            return self.final
        last = {seed: curve[-1].at_loops.get(loops) for seed, curve in self.curves.items()}
        return {seed: loss for seed, loss in last.items() if loss is not None}

    @property
    def task_scores(self) -> dict[int, list[dict[str, Any]]]:
        """The scores of `yoco_u.evaluation.levels`, by seed; empty if they were not measured."""
        return {seed: taken["tasks"] for seed, taken in self.measures.items() if "tasks" in taken}

    def right(self, task: str) -> dict[int, dict[int, float]]:
        """The share of right answers to a task, by seed, then by level."""
        found = {
            seed: {score["level"]: score["accuracy"] for score in scores if score["task"] == task}
            for seed, scores in self.task_scores.items()
        }
        return {seed: by_level for seed, by_level in found.items() if by_level}

    def at(self, cost: Cost, xs: Sequence[float]) -> dict[int, list[float]]:
        """The losses at `xs` tokens or FLOPs by seed, straight between evaluations over the logarithm; the last one holds on.

        Raises:
            NotDecidable: if a run was first evaluated later than at the first of `xs`.
        """
        first = max(getattr(curve[0], cost) for curve in self.curves.values())
        if first > min(xs) and not equal_cost(first, min(xs)):
            raise NotDecidable(
                f"{self.label} was first evaluated after {first / getattr(self, cost):.0%} of its {cost}, which is too late; "
                "lower training.evaluate_every"
            )
        return {
            seed: np.interp(np.log(xs), [math.log(getattr(p, cost)) for p in curve], [p.loss for p in curve]).tolist()
            for seed, curve in self.curves.items()
        }


@dataclass(frozen=True)
class Results:
    """A grid as far as it is trained.

    Attributes:
        runs: all runs of the grid, in its order, whatever their state.
        series: the finished runs, grouped into series.
    """

    runs: tuple[RunResult, ...]
    series: tuple[Series, ...]

    @property
    def unfinished(self) -> list[RunResult]:
        return [result for result in self.runs if result.state != "finished"]

    def of_size(self, size: str) -> "Results":
        """The part of the grid that has this size."""
        runs = tuple(result for result in self.runs if result.run.size == size)
        return Results(runs, tuple(series for series in self.series if series.size == size))

    def of_role(self, role: Role, loops: int | None = None) -> list[Series]:
        """The series of models with this role, most tokens last; with `loops`, those of that loop count alone."""
        found = [series for series in self.series if series.role == role and loops in (None, series.loops)]
        return sorted(found, key=lambda series: series.tokens)

    def pairs(self, role: Role, other: Role, equal: Cost, loops: int | None = None) -> list[tuple[Series, Series]]:
        """Series of two roles that spent equal tokens or equal FLOPs, most tokens last.

        Where a role has several series of equal cost, the `best` stands for it: so each architecture is as well tuned as the
        grid allows.

        Args:
            loops: loop count of the series of `role`; any by default.
        """
        found = []
        for cost, some in _by_cost(self.of_role(role, loops), equal):
            others = [series for series in self.of_role(other) if equal_cost(getattr(series, equal), cost)]
            if others:
                found.append((best(some), best(others)))
        return found


def best(series: Iterable[Series]) -> Series:
    """The series of the lowest mean loss, among those with the most seeds.

    The lowest of several means is lower by chance too, so it bears how many it was chosen from.
    """
    found = list(series)
    return replace(min(found, key=lambda one: (-len(one.curves), one.loss.mean)), chosen_from=len(found))


def gaps_by_seed(pairs: Sequence[tuple[Series, Series]]) -> list[list[float]]:
    """For each seed that all series have, the difference of the two final losses of each pair."""
    seeds = set.intersection(*({*one.final} & {*other.final} for one, other in pairs))
    return [[one.final[seed] - other.final[seed] for one, other in pairs] for seed in sorted(seeds)]


def _by_cost(found: Sequence[Series], cost: Cost) -> list[tuple[float, list[Series]]]:
    """Groups of series of equal cost, fewest tokens first, each with the cost of its first series."""
    groups: list[tuple[float, list[Series]]] = []
    for series in sorted(found, key=lambda series: (series.tokens, series.flops)):
        value = getattr(series, cost)
        group = next((group for known, group in groups if equal_cost(value, known)), None)
        if group is None:
            groups.append((value, [series]))
        else:
            group.append(series)
    return groups


def read_results(runs: Sequence[GridRun], folder: Path, elsewhere: Mapping[str, RunResult] | None = None) -> Results:
    """Read the folders of all runs of a grid, finished or not.

    Args:
        folder: folder of the experiment.
        elsewhere: results by the names of the runs whose folders are not read.

    Raises:
        UserError: if no run is finished, a folder is damaged or holds a run of other settings, or two runs had not one dataset.
    """
    elsewhere = elsewhere or {}
    results = results_of(tuple(elsewhere.get(run.name) or _read_result(run, folder / run.name) for run in runs))
    if not results.series:
        raise UserError(f"{folder}: none of the {len(runs)} runs is finished yet; train them without --report first")
    check_one_dataset({one.report or folder / one.run.name: one.dataset for one in results.runs if one.state == "finished"})
    return results


def results_of(runs: tuple[RunResult, ...]) -> Results:
    """The runs of a grid, with those that are finished grouped into series."""
    groups: dict[str, list[RunResult]] = {}
    for result in runs:
        if result.state == "finished":
            groups.setdefault(result.run.series, []).append(result)
    return Results(runs, tuple(_series(group) for group in groups.values()))


def _read_result(run: GridRun, folder: Path) -> RunResult:
    finished = is_finished(folder)
    if not finished and not _has_records(folder / METRICS):
        return RunResult(run, "not begun", (), 0.0, {})
    RunFolder(folder).check_same(run.config)
    recorded = read_run(folder)
    keys = {loops_key(loops): loops for loops in run.config.training.evaluate_loops}
    curve = tuple(
        Point(record["tokens"], record["flops"], record["loss"], {t: record.get(key) for key, t in keys.items()})
        for record in recorded.kind("evaluation")
    )
    state: State = "unfinished"
    if finished:
        state = "finished"
    elif has_diverged(folder):
        state = "diverged"
    steps = recorded.kind("train")
    return RunResult(run, state, curve, steps[-1]["seconds"] if steps else 0.0, read_measures(folder), dataset_of(folder))


def _has_records(metrics: Path) -> bool:
    """Whether the file is there and has a whole line: a run may have been stopped before its first one."""
    try:
        check_regular(metrics)
        with metrics.open("rb") as lines:
            return lines.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def _series(group: Sequence[RunResult]) -> Series:
    run, final = group[0].run, group[0].final
    architecture = run.config.architecture
    return Series(
        name=run.series,
        label=run.label,
        model=run.model,
        model_label=run.model_label,
        role=run.role,
        size=run.size,
        budget=run.budget,
        loops=architecture.num_loops,
        gated=any(stage.loop_gate is not None for stage in architecture.stages),
        parameters=parameters(architecture).total,
        tokens=final.tokens,
        flops=final.flops,
        curves={result.run.seed: result.curve for result in group},
        layers=tuple(stage.layers for stage in architecture.stages),
        unrolled_layers=architecture.unrolled_layers,
        measures={result.run.seed: result.measures for result in group},
    )
