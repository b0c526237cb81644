"""What the runs of a grid came to: validation curves by seed, and the series that differ in nothing but their seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from yoco_u.budget import parameters
from yoco_u.experiment.config import Role
from yoco_u.experiment.grid import GridRun
from yoco_u.experiment.intervals import Interval, interval
from yoco_u.experiment.measure import read_measures
from yoco_u.experiment.run import has_diverged, is_finished
from yoco_u.training.metrics import METRICS
from yoco_u.training.run_folder import RunFolder, read_run

State = Literal["finished", "unfinished", "diverged", "not begun"]

ALIKE = 0.01
"""Share by which tokens, FLOPs or parameters of two series may differ and still be called equal: steps are whole."""


@dataclass(frozen=True)
class Point:
    """An evaluation on the validation split: nats per token after so many tokens and model FLOPs of training."""

    tokens: int
    flops: float
    loss: float


@dataclass(frozen=True)
class RunResult:
    """
    Attributes:
        curve: all evaluations so far, in their order.
        seconds: of training so far.
        measures: by name, see `yoco_u.experiment.measure`.
    """

    run: GridRun
    state: State
    curve: tuple[Point, ...]
    seconds: float
    measures: dict[str, Any]

    @property
    def final(self) -> Point:
        return self.curve[-1]


@dataclass(frozen=True)
class Series:
    """The finished runs that differ in their seeds alone; at least one.

    Attributes:
        loops: the largest loop count of a stage.
        gated: whether a looped stage has gates.
        parameters: of each model.
        tokens, flops: of each run.
        curves: by seed.
        layers: blocks in each stage, before looping.
        measures: by seed, then by name.
    """

    name: str
    label: str
    model: str
    model_label: str
    role: Role | None
    loops: int
    gated: bool
    parameters: int
    tokens: int
    flops: float
    curves: dict[int, tuple[Point, ...]]
    layers: tuple[int, ...]
    measures: dict[int, dict[str, Any]]

    @property
    def final(self) -> dict[int, float]:
        """The last validation loss by seed."""
        return {seed: curve[-1].loss for seed, curve in self.curves.items()}

    @property
    def loss(self) -> Interval:
        """Of the last validation losses, over the seeds."""
        return interval(list(self.final.values()))

    @property
    def needles(self) -> list[dict[str, Any]]:
        """The scores of `yoco_u.evaluation.needle_grid`, of all seeds; none if they were not measured."""
        return [score for taken in self.measures.values() for score in taken.get("needles", [])]

    def at(self, tokens: float) -> dict[int, float]:
        """The loss of the evaluation nearest to so many tokens, by seed."""
        return {seed: min(curve, key=lambda point: abs(point.tokens - tokens)).loss for seed, curve in self.curves.items()}


@dataclass(frozen=True)
class Results:
    """A grid as far as it is trained."""

    runs: tuple[RunResult, ...]
    series: tuple[Series, ...]

    @property
    def unfinished(self) -> list[RunResult]:
        return [result for result in self.runs if result.state != "finished"]

    def of_role(self, role: Role, loops: int | None = None) -> list[Series]:
        """The series that stand for an architecture, most tokens last; `loops` takes those of one loop count."""
        found = [series for series in self.series if series.role == role and loops in (None, series.loops)]
        return sorted(found, key=lambda series: series.tokens)

    def pairs(
        self, role: Role, other: Role, equal: Literal["tokens", "flops"], loops: int | None = None
    ) -> list[tuple[Series, Series]]:
        """Series of the two roles that spent the same, most tokens last.

        Where a role has several series of one cost, it is the one of the lowest loss: each architecture as well tuned as the
        grid allows.
        """
        found = []
        for cost, some in _by_cost(self.of_role(role, loops), equal):
            others = [series for series in self.of_role(other) if near(getattr(series, equal), cost)]
            if others:
                found.append((best(some), best(others)))
        return found


def near(value: float, other: float) -> bool:
    return abs(value / other - 1) <= ALIKE


def best(series: Iterable[Series]) -> Series:
    """The one of the lowest mean loss, of those with the most seeds."""
    return min(series, key=lambda series: (-len(series.curves), series.loss.mean))


def _by_cost(found: Sequence[Series], cost: str) -> list[tuple[float, list[Series]]]:
    groups: list[tuple[float, list[Series]]] = []
    for series in sorted(found, key=lambda series: (series.tokens, series.flops)):
        value = getattr(series, cost)
        group = next((group for known, group in groups if near(value, known)), None)
        if group is None:
            groups.append((value, [series]))
        else:
            group.append(series)
    return groups


def read_results(runs: Sequence[GridRun], folder: Path) -> Results:
    """Read the folders of the runs, whatever their state.

    Raises:
        UserError: if a folder is damaged, or holds a run of other settings.
    """
    results = tuple(_read_result(run, folder / run.name) for run in runs)
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        if result.state == "finished":
            groups.setdefault(result.run.series, []).append(result)
    return Results(results, tuple(_series(group) for group in groups.values()))


def _read_result(run: GridRun, folder: Path) -> RunResult:
    if not _has_records(folder / METRICS):
        return RunResult(run, "not begun", (), 0.0, {})
    RunFolder(folder).check_same(run.config)
    recorded = read_run(folder)
    curve = tuple(Point(record["tokens"], record["flops"], record["loss"]) for record in recorded.kind("evaluation"))
    state: State = "unfinished"
    if is_finished(folder):
        state = "finished"
    elif has_diverged(folder):
        state = "diverged"
    steps = recorded.kind("train")
    return RunResult(run, state, curve, steps[-1]["seconds"] if steps else 0.0, read_measures(folder))


def _has_records(metrics: Path) -> bool:
    try:
        with metrics.open(encoding="utf-8") as lines:
            return lines.readline().endswith("\n")
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
        loops=architecture.num_loops,
        gated=any(stage.loop_gate is not None for stage in architecture.stages),
        parameters=parameters(architecture).total,
        tokens=final.tokens,
        flops=final.flops,
        curves={result.run.seed: result.curve for result in group},
        layers=tuple(stage.layers for stage in architecture.stages),
        measures={result.run.seed: result.measures for result in group},
    )
