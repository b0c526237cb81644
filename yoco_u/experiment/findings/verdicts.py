"""The outcome of a finding: one of three verdicts, and the texts for intervals and trends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from yoco_u.experiment.intervals import Interval, Trend
from yoco_u.experiment.results import Series
from yoco_u.formatting import short_count

Verdict = Literal["confirmed", "not confirmed", "not decidable at this scale"]

OPEN: Literal["not decidable at this scale"] = "not decidable at this scale"


@dataclass(frozen=True)
class Outcome:
    """What a grid says about a finding.

    Attributes:
        text: sentences that say what was compared and what came out, with the numbers.
        numbers: the same numbers by name, for report.json; empty if the grid cannot speak about the finding.
    """

    verdict: Verdict
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


def of_sign(claimed_negative: Interval, parts: int = 1) -> Verdict:
    """The verdict on a difference that is claimed to be negative.

    It is decided only if the 95% interval lies on one side of zero.

    Args:
        parts: number of parts of the claim, each of which would refute it. To refute, an interval must hold among so many.
    """
    if claimed_negative.high is not None and claimed_negative.high < 0:
        return "confirmed"
    low = claimed_negative.among(parts).low
    return "not confirmed" if low is not None and low > 0 else OPEN


def all_negative(claimed: Sequence[Interval]) -> Verdict:
    """The verdict on the claim that several differences are negative: one that is not refutes it, and all confirm it.

    By chance one of many lies on the wrong side, so the 95% to refute hold for all of them together. Confirming needs no such
    care, as all must hold.
    """
    return together(of_sign(one, len(claimed)) for one in claimed)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim with several parts: one part that fails refutes it, and all must hold to confirm it."""
    found = set(verdicts)
    for verdict in ("not confirmed", OPEN):
        if verdict in found:
            return verdict
    return "confirmed"


def signed(value: float) -> str:
    """Nats with their sign; the minus is the typographic one."""
    return f"{value:+.4f}".replace("-", "\u2212")


def difference_text(found: Interval) -> str:
    """−0.0123 (95%: −0.0200 to −0.0046, 3 seeds)"""
    if found.low is None or found.high is None:
        return f"{signed(found.mean)} ({no_interval(found)})"
    return f"{signed(found.mean)} (95%: {signed(found.low)} to {signed(found.high)}, {found.count} seeds)"


def choice_text(*compared: Series) -> str:
    """A sentence, after a space, on those that were chosen among several of their role; empty if none was."""
    told = {one.name: f"{one.label} is the best of {one.chosen_from}" for one in compared if one.chosen_from > 1}
    return f" {'; '.join(told.values())}, by the losses of these very seeds, which favours it." if told else ""


def no_interval(found: Interval) -> str:
    """Why there is none: one seed, no interval"""
    return "one seed, no interval" if found.count == 1 else f"the same for {found.count} seeds, no interval"


def loss_text(found: Interval) -> str:
    """2.4123 ± 0.0041"""
    return f"{found.mean:.4f}{_half_text(found)}"


def short_difference_text(found: Interval) -> str:
    """−0.0123 ± 0.0077"""
    return f"{signed(found.mean)}{_half_text(found)}"


def _half_text(found: Interval) -> str:
    if found.high is None:
        return " (one seed)" if found.count == 1 else f" ({found.count} seeds, all the same)"
    return f" ± {found.high - found.mean:.4f}"


def trend_text(trend: Trend, gap: float, unit: str) -> str:
    """A sentence on what a gap does as x doubles, and where it would close.

    Args:
        gap: the gap at the last x; a negative one is a lead.
        unit: what x counts: `tokens`, `FLOPs` or `parameters`.
    """
    low, high, rate = trend.per_doubling.low, trend.per_doubling.high, trend.per_doubling.mean
    moves = f"{difference_text(trend.per_doubling)} nats whenever the {unit} double"
    if low is None or high is None or low <= 0 <= high:
        return f"Whether it grows or shrinks cannot be told: {moves}."
    if gap < 0:
        return f"The lead {'grows' if rate < 0 else 'shrinks'}: {moves}."
    if rate >= 0:
        return f"The lag does not close: {moves}."
    if trend.crossing is None:
        return f"The lag closes: {moves}."
    return f"The lag closes: {moves}; carried on in a straight line it would cross zero at {_range_text(trend.crossing, unit)}."


def _range_text(found: Interval, unit: str) -> str:
    def amount(value: float) -> str:
        return f"{value:.2g}" if unit == "FLOPs" else short_count(value)

    if found.low is None or found.high is None:
        return f"about {amount(found.mean)} {unit}"
    return f"about {amount(found.mean)} {unit} (95%: {amount(found.low)} to {amount(found.high)})"
