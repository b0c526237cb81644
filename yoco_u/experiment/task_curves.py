"""The generated tasks of a grid as curves: the right answers of each model at each level."""

from collections.abc import Sequence
from dataclasses import dataclass

from yoco_u.data.synthetic import TASKS
from yoco_u.experiment.results import Series


@dataclass(frozen=True)
class TaskCurve:
    """The right answers of one model to a task.

    Attributes:
        series: the model.
        shares: for each level, the share of right answers of each seed.
    """

    series: Series
    shares: dict[int, list[float]]

    def mean(self, level: int) -> float:
        """The share of right answers at a level, the mean over the seeds."""
        return sum(self.shares[level]) / len(self.shares[level])

    @property
    def overall(self) -> float:
        """The mean over all levels."""
        return sum(map(self.mean, self.shares)) / len(self.shares)


@dataclass(frozen=True)
class TaskCurves:
    """One task, and the curve of each model that was asked.

    Attributes:
        counts: what a level counts, such as hops.
        levels: all levels, ascending.
    """

    task: str
    counts: str
    levels: list[int]
    curves: list[TaskCurve]


def task_curves(found: Sequence[Series]) -> list[TaskCurves]:
    """The curves of each task that was measured, in the order of `TASKS`; the models with the most right answers first."""
    tasks = []
    for name, task in TASKS.items():
        curves = [TaskCurve(series, shares) for series in found if (shares := _shares(series, name))]
        if curves:
            levels = sorted(set().union(*(curve.shares for curve in curves)))
            tasks.append(TaskCurves(name, task.counts, levels, sorted(curves, key=lambda curve: -curve.overall)))
    return tasks


def _shares(series: Series, task: str) -> dict[int, list[float]]:
    by_seed = series.right(task).values()
    levels = sorted(set().union(*by_seed))
    return {level: [by_level[level] for by_level in by_seed if level in by_level] for level in levels}
