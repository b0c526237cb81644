"""Tests of the findings on drawn loop counts: one model beside those trained at a single T, and beyond what it runs itself."""

from collections.abc import Sequence
from typing import Any

from yoco_u.experiment.findings.verdicts import Outcome, Verdict, difference_text, loss_text, of_sign, together
from yoco_u.experiment.intervals import Interval, NotDecidable, difference, interval
from yoco_u.experiment.results import Results, Series, best
from yoco_u.report.comparison import equal_cost

NEAR = 0.02
"""Nats per token by which one loss may be above another and still counts as no worse."""

COMPARED, FROM, BEYOND = (1, 2, 3), 3, (5, 8)
"""The loop counts judged against models of a single T; and those judged, beyond the third of these, against the same model."""


def as_good_as_one_loop_count(results: Results) -> Outcome:
    """The best model of drawn loop counts against the models trained at T = 1, 2 and 3 alone; the others are told."""
    drawn = _drawn(results)
    text, numbers = list[str](), dict[str, Any]()
    alone = {loops: _alone(results, loops, drawn[0].tokens) for loops in (*COMPARED, *BEYOND)}
    if missing := [loops for loops in COMPARED if alone[loops] is None]:
        raise NotDecidable(f"no model of T = {', '.join(map(str, missing))} alone is finished at equal tokens")
    for series in drawn:
        compared = {loops: difference(series.at_loops(loops), one.final) for loops, one in alone.items() if one is not None}
        numbers[series.label] = {f"T={loops}": found for loops, found in compared.items()}
        told = ", ".join(
            f"T={loops} {loss_text(interval(list(series.at_loops(loops).values())))}, {difference_text(found)}"
            for loops, found in compared.items()
        )
        text.append(f"{series.label}, and minus the model of that T alone: {told}.")
    judged = (_no_worse(numbers[drawn[0].label][f"T={loops}"]) for loops in COMPARED)
    return Outcome(together(judged), " ".join(text), numbers)


def no_worse_beyond(results: Results) -> Outcome:
    """The loss at T = 5 and 8 of the best model of drawn loop counts minus its own at T = 3; the others, and the model of T = 3
    alone, are told."""
    drawn = _drawn(results)
    alone = _alone(results, FROM, drawn[0].tokens)
    text, numbers = list[str](), dict[str, Any]()
    for series in (*drawn, *([alone] if alone is not None and set(BEYOND) <= alone.evaluated_at else [])):
        found = {loops: difference(series.at_loops(loops), series.at_loops(FROM)) for loops in BEYOND}
        numbers[series.label] = {f"T={loops}": one for loops, one in found.items()}
        told = ", ".join(f"T={loops} {difference_text(one)}" for loops, one in found.items())
        text.append(f"{series.label}, minus its own T={FROM}: {told}.")
    judged = (_no_worse(numbers[drawn[0].label][f"T={loops}"]) for loops in BEYOND)
    return Outcome(together(judged), " ".join(text), numbers)


def _drawn(results: Results) -> list[Series]:
    """The models of drawn loop counts at the most tokens that one has, the best first.

    Raises:
        NotDecidable: if there is none, or one was not evaluated at all loop counts that are judged.
    """
    found = results.of_role("drawn_loops")
    if not found:
        raise NotDecidable("no model of drawn loop counts is finished")
    found = [series for series in found if equal_cost(series.tokens, found[-1].tokens)]
    for series in found:
        if missing := {*COMPARED, *BEYOND} - series.evaluated_at:
            raise NotDecidable(f"{series.label} was not evaluated at T = {', '.join(map(str, sorted(missing)))}")
    first = best(found)
    return [first, *(series for series in found if series is not first)]


def _alone(results: Results, loops: int, tokens: int) -> Series | None:
    """The best model trained at this T alone; YOCO counts as one loop."""
    candidates: Sequence[Series] = results.of_role("yoco_u", loops) + (results.of_role("yoco") if loops == 1 else [])
    found = [series for series in candidates if equal_cost(series.tokens, tokens)]
    return best(found) if found else None


def _no_worse(found: Interval) -> Verdict:
    return of_sign(found.map(lambda value: value - NEAR))
