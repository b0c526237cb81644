"""Tests of the findings on drawn loop counts: one model beside those trained at a single T, and beyond what it runs itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from yoco_u.experiment.findings.verdicts import Outcome, Verdict, all_negative, choice_text, difference_text, loss_text
from yoco_u.experiment.intervals import Interval, NotDecidable, difference, interval
from yoco_u.experiment.results import Results, Series, best
from yoco_u.report.comparison import equal_cost

NEAR = 0.02
"""Nats per token by which one loss may be above another and still counts as no worse."""

COMPARED, FROM, BEYOND = (1, 2, 3), 3, (5, 8)
"""The loop counts judged against models of a single T; and those judged, beyond the third of these, against the same model."""


def as_good_as_one_loop_count(results: Results) -> Outcome:
    """The best model of drawn loop counts against the models trained at T = 1, 2 and 3 alone; the others are told."""
    drawn = _drawn(results, COMPARED)
    text, numbers = list[str](), dict[str, Any]()
    alone = {loops: _alone(results, loops, drawn[0].tokens) for loops in (*COMPARED, *BEYOND)}
    if missing := [loops for loops in COMPARED if alone[loops] is None]:
        raise NotDecidable(f"no model of T = {', '.join(map(str, missing))} alone is finished at equal tokens")
    finals = {loops: one.final for loops, one in alone.items() if one is not None}
    differences = [(series, _differences(series, finals)) for series in drawn]
    for series, found in differences:
        numbers[series.label] = {f"T={loops}": one for loops, one in found.items()}
        told = ", ".join(
            f"T={loops} {_told(one)}" if one is None else f"T={loops} {loss_text(_loss(series, loops))}, {_told(one)}"
            for loops, one in found.items()
        )
        text.append(f"{series.label}, and minus the model of that T alone: {told}.")
    chosen = choice_text(drawn[0], *(one for one in alone.values() if one is not None))
    return Outcome(_no_worse(differences[0][1], COMPARED), " ".join(text) + chosen, numbers)


def no_worse_beyond(results: Results) -> Outcome:
    """The loss at T = 5 and 8 of the best model of drawn loop counts minus its own at T = 3; the others, and the model of T = 3
    alone, are told."""
    drawn = _drawn(results, (FROM, *BEYOND))
    alone = _alone(results, FROM, drawn[0].tokens)
    text, numbers = list[str](), dict[str, Any]()
    told_too = [] if alone is None else [alone]
    differences = [(one, _differences(one, dict.fromkeys(BEYOND, one.at_loops(FROM)))) for one in (*drawn, *told_too)]
    for series, found in differences:
        if found:
            numbers[series.label] = {f"T={loops}": one for loops, one in found.items()}
            told = ", ".join(f"T={loops} {_told(one)}" for loops, one in found.items())
            text.append(f"{series.label}, minus its own T={FROM}: {told}.")
    return Outcome(_no_worse(differences[0][1], BEYOND), " ".join(text) + choice_text(drawn[0]), numbers)


def _drawn(results: Results, judged_at: Iterable[int]) -> list[Series]:
    """The models of drawn loop counts at the most tokens that one has, the best first, which is judged.

    Raises:
        NotDecidable: if there is none, or the best was not evaluated at all loop counts at which it is judged.
    """
    found = results.of_role("drawn_loops")
    if not found:
        raise NotDecidable("no model of drawn loop counts is finished")
    found = [series for series in found if equal_cost(series.tokens, found[-1].tokens)]
    first = best(found)
    if missing := {*judged_at} - first.evaluated_at:
        raise NotDecidable(f"{first.label} was not evaluated at T = {', '.join(map(str, sorted(missing)))}")
    return [first, *(series for series in found if series.name != first.name)]


def _alone(results: Results, loops: int, tokens: int) -> Series | None:
    """The best model trained at this T alone; YOCO counts as one loop."""
    candidates: Sequence[Series] = results.of_role("yoco_u", loops) + (results.of_role("yoco") if loops == 1 else [])
    found = [series for series in candidates if equal_cost(series.tokens, tokens)]
    return best(found) if found else None


def _differences(series: Series, others: Mapping[int, Mapping[int, float]]) -> dict[int, Interval | None]:
    """A model's losses minus others, at those loop counts at which it was evaluated; None where one of its own is not finite.

    Args:
        others: losses by loop count, then by seed. A loop count without a seed in common is left out.
    """
    found: dict[int, Interval | None] = {}
    for loops, by_seed in others.items():
        common, own = series.curves.keys() & by_seed.keys(), series.at_loops(loops)
        if common and loops in series.evaluated_at:
            found[loops] = difference(own, by_seed) if common <= own.keys() else None
    return found


def _loss(series: Series, loops: int) -> Interval:
    return interval(list(series.at_loops(loops).values()))


def _told(found: Interval | None) -> str:
    return "not finite" if found is None else difference_text(found)


def _no_worse(found: Mapping[int, Interval | None], judged_at: Sequence[int]) -> Verdict:
    """The verdict on differences of at most `NEAR`; a loss that is not finite is infinitely worse than one that is.

    Raises:
        NotDecidable: if there was no seed in common at a loop count.
    """
    if missing := [loops for loops in judged_at if loops not in found]:
        raise NotDecidable(f"at T = {', '.join(map(str, missing))} there is no seed in common")
    judged = [found[loops] for loops in judged_at]
    if None in judged:
        return "not confirmed"
    return all_negative([one.map(lambda value: value - NEAR) for one in judged if one is not None])
