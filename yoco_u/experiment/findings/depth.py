"""Tests of what depth buys in generated tasks: right answers of YOCO-U against those of a YOCO of equal cost.

Not of the paper. On looped Transformers, Saunshi et al. (arXiv 2502.17416) find that depth decides such tasks.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from yoco_u.data.synthetic import TASKS
from yoco_u.experiment.config import Role
from yoco_u.experiment.findings.comparisons import paper_loops
from yoco_u.experiment.findings.verdicts import OPEN, Outcome, choice_text, no_interval, of_sign
from yoco_u.experiment.intervals import Interval, NotDecidable, difference, interval
from yoco_u.experiment.results import Cost, Results, Series, best
from yoco_u.formatting import scientific, short_count
from yoco_u.report.comparison import equal_cost

COUNTED = 0.5
"""The least number of questions of a level that counts, as a share of that of the level with the most. Where there are fewer,
the level has so few instances that models know those of training by heart."""

SOLVED = 0.9
"""Share of right answers to the lowest level from which on depths are compared: before it, a model has not learned the task."""

Equal = Literal["parameters", "flops", "depth"]
EQUALS: tuple[Equal, ...] = get_args(Equal)


class _Comparison(NamedTuple):
    """What a YOCO has in common with the YOCO-U that it is compared with: its role, the cost, and both in words."""

    role: Role
    cost: Cost
    says: str
    needs: str


_COMPARISONS: dict[Equal, _Comparison] = {
    "parameters": _Comparison("yoco", "tokens", "equal parameters and steps", "a yoco of equal parameters and tokens"),
    "flops": _Comparison("yoco", "flops", "equal FLOPs, which takes more steps", "a yoco matched to its FLOPs"),
    "depth": _Comparison(
        "unrolled_yoco",
        "tokens",
        "equal unrolled depth, which has more parameters",
        "an unrolled_yoco of as many layers as it has unrolled, and equal tokens",
    ),
}


def statement(task: str, equal: Equal) -> str:
    return f"Not of the paper: in {task} YOCO-U has more right answers than a YOCO of {_COMPARISONS[equal].says}."


def needs(equal: Equal) -> str:
    return f"yoco_u and {_COMPARISONS[equal].needs}, with measures.tasks"


def measured_tasks(results: Results) -> list[str]:
    """The tasks that models of the grid were asked, in the order of `TASKS`."""
    asked = {score["task"] for series in results.series for scores in series.task_scores.values() for score in scores}
    return [task for task in TASKS if task in asked]


def more_right(results: Results, task: str, equal: Equal) -> Outcome:
    """The mean share of right answers over the levels of a task that both were asked in all seeds, YOCO-U's against YOCO's.

    Raises:
        NotDecidable: if a model that this needs is not finished, or was not asked, or if there is no such level.
    """
    looped, plain = _pair(results, _COMPARISONS[equal])
    ours, theirs = (_counted(series, task) for series in (looped, plain))
    if not ours or not theirs:
        raise NotDecidable(f"{(plain if ours else looped).label} was not asked {task}")
    levels = sorted(set.intersection(*(set(by_level) for by_level in [*ours.values(), *theirs.values()])))
    if not levels:
        raise NotDecidable(f"{looped.label} and {plain.label} were asked no level of {task} in common")
    ours, theirs = ({seed: {n: of[n] for n in levels} for seed, of in right.items()} for right in (ours, theirs))
    found = difference(_means(ours), _means(theirs))
    shares = {level: tuple(_at(right, level) for right in (ours, theirs)) for level in levels}
    by_level = ", ".join(f"{level}: {one:.0%} and {other:.0%}" for level, (one, other) in shares.items())
    text = (
        f"{_told(looped, ours)} against {_told(plain, theirs)}: {points_text(found)} in the mean over the levels. By "
        f"{TASKS[task].counts}, {by_level}."
    )
    numbers = {"difference": found, "right_by_level": {str(level): list(both) for level, both in shares.items()}}
    unsolved = [series.label for series, share in zip((looped, plain), shares[levels[0]], strict=True) if share < SOLVED]
    if unsolved:
        text += (
            f" {' and '.join(unsolved)} answered less than {SOLVED:.0%} of the lowest level, so depth is not compared yet: "
            "train longer, or on lower levels."
        )
        return Outcome(OPEN, text, numbers)
    return Outcome(of_sign(-found), text + choice_text(looped, plain), numbers)


def points_text(found: Interval) -> str:
    """+12.3 points (95%: +4.1 to +20.5, 5 seeds)"""
    mean, low, high = (
        None if one is None else f"{100 * one:+.1f}".replace("-", "\u2212") for one in (found.mean, found.low, found.high)
    )
    return f"{mean} points ({no_interval(found) if low is None else f'95%: {low} to {high}, {found.count} seeds'})"


def _pair(results: Results, comparison: _Comparison) -> tuple[Series, Series]:
    """The best YOCO-U and YOCO of equal cost, at the most tokens; of unrolled YOCOs only those that are as deep."""
    loops = paper_loops(results)
    for looped in sorted(results.of_role("yoco_u", loops), key=lambda series: (-series.tokens, series.loss.mean)):
        others = [
            series
            for series in results.of_role(comparison.role)
            if equal_cost(getattr(series, comparison.cost), getattr(looped, comparison.cost))
            and (comparison.role == "yoco" or series.unrolled_layers == looped.unrolled_layers)
        ]
        if others:
            return looped, best(others)
    raise NotDecidable(f"no YOCO-U and YOCO of {comparison.says} are finished")


def _counted(series: Series, task: str) -> dict[int, dict[int, float]]:
    """The share of right answers, by seed, then by level, at the levels that count."""
    scores = {seed: [one for one in asked if one["task"] == task] for seed, asked in series.task_scores.items()}
    most = max((one["answers"] for asked in scores.values() for one in asked), default=0)
    return {
        seed: {one["level"]: one["accuracy"] for one in asked if one["answers"] >= COUNTED * most}
        for seed, asked in scores.items()
        if asked
    }


def _means(right: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    return {seed: sum(by_level.values()) / len(by_level) for seed, by_level in right.items()}


def _at(right: Mapping[int, Mapping[int, float]], level: int) -> float:
    return sum(by_level[level] for by_level in right.values()) / len(right)


def _told(series: Series, right: Mapping[int, Mapping[int, float]]) -> str:
    mean = interval(list(_means(right).values())).mean
    return (
        f"{series.label} {mean:.1%} ({short_count(series.parameters)} parameters, {series.unrolled_layers} layers unrolled, "
        f"{short_count(series.tokens)} tokens, {scientific(series.flops)} FLOPs)"
    )
