"""The gap between YOCO-U and YOCO against the size of the model, over the sizes of one grid."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from yoco_u.experiment.config import Experiment
from yoco_u.experiment.findings.comparisons import paper_loops
from yoco_u.experiment.intervals import Interval, NotDecidable, Trend, difference, gap_trend
from yoco_u.experiment.results import Cost, Results, Series, gaps_by_seed
from yoco_u.experiment.summary import Summary, summarize
from yoco_u.version import __version__


@dataclass(frozen=True)
class SizeGap:
    """YOCO-U beside the YOCO of equal cost, at one size.

    Attributes:
        looped, plain: their finished runs.
        difference: the final loss of YOCO-U minus that of YOCO, paired by seed.
    """

    size: str
    looped: Series
    plain: Series
    difference: Interval


@dataclass(frozen=True)
class GapLine:
    """The gap over the sizes, at one budget.

    Attributes:
        cost: what YOCO-U and YOCO spend equally much of.
        budget: the value on the axis of tokens, or of tokens per parameter; None without that axis.
        gaps: the gap at each size that has both, the fewest parameters first.
        trend: a straight line over the logarithm of parameters for each seed that all these sizes have; None where the runs do
            not suffice for one.
        reason: why there is no trend; None if there is one.
    """

    cost: Cost
    budget: int | None
    gaps: tuple[SizeGap, ...]
    trend: Trend | None
    reason: str | None


@dataclass(frozen=True)
class SizesSummary:
    """What the report of a grid with sizes shows.

    Attributes:
        sizes: the summary of each size that has a finished run.
        lines: the gap over the sizes, for each budget at equal tokens, then for each at equal FLOPs.
    """

    experiment: Experiment
    results: Results
    sizes: dict[str, Summary]
    lines: list[GapLine]

    def of_cost(self, cost: Cost) -> list[GapLine]:
        return [line for line in self.lines if line.cost == cost]

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "title": self.experiment.title,
            "version": __version__,
            "experiment": self.experiment.model_dump(mode="json"),
            "gaps": [_line_json(line) for line in self.lines],
            "sizes": {size: summary.as_json() for size, summary in self.sizes.items()},
        }


def summarize_sizes(experiment: Experiment, results: Results) -> SizesSummary:
    """Summarize every size as a grid of its own, and compare the gaps of all of them."""
    by_size = {size: found for size in experiment.sizes if (found := results.of_size(size)).series}
    budgets = experiment.tokens or experiment.tokens_per_parameter or (None,)
    lines = [_line(cost, budget, by_size) for cost in get_args(Cost) for budget in budgets]
    sizes = {size: summarize(experiment.at_size(size), found) for size, found in by_size.items()}
    return SizesSummary(experiment, results, sizes, lines)


def _line(cost: Cost, budget: int | None, by_size: dict[str, Results]) -> GapLine:
    found = [gap for size, results in by_size.items() if (gap := _gap(cost, budget, size, results)) is not None]
    gaps = tuple(sorted(found, key=lambda gap: gap.looped.parameters))
    try:
        return GapLine(cost, budget, gaps, _trend(gaps), None)
    except NotDecidable as why:
        return GapLine(cost, budget, gaps, None, str(why))


def _gap(cost: Cost, budget: int | None, size: str, results: Results) -> SizeGap | None:
    """The gap at one size; None where the two are not finished with a seed in common."""
    try:
        pairs = results.pairs("yoco_u", "yoco", cost, paper_loops(results))
        looped, plain = next(pair for pair in pairs if pair[0].budget == budget)
        return SizeGap(size, looped, plain, difference(looped.final, plain.final))
    except (NotDecidable, StopIteration):
        return None


def _trend(gaps: Sequence[SizeGap]) -> Trend:
    """The trend of a gap over the parameters.

    Raises:
        NotDecidable: with fewer than three sizes, or if they have no seed in common.
    """
    if len(gaps) < 3:
        raise NotDecidable(f"a trend needs the gap at 3 or more sizes, there are {len(gaps)}")
    by_seed = gaps_by_seed([(gap.looped, gap.plain) for gap in gaps])
    if not by_seed:
        raise NotDecidable("the sizes have no seed in common")
    return gap_trend([gap.looped.parameters for gap in gaps], by_seed)


def _line_json(line: GapLine) -> dict[str, Any]:
    gaps = [
        {
            "size": gap.size,
            "parameters": gap.looped.parameters,
            "tokens": gap.looped.tokens,
            "series": gap.looped.name,
            "other": gap.plain.name,
            "difference": asdict(gap.difference),
        }
        for gap in line.gaps
    ]
    trend = None if line.trend is None else asdict(line.trend)
    return {"equal": line.cost, "budget": line.budget, "gaps": gaps, "trend": trend, "reason": line.reason}
