"""Tests of the findings on loops: the loss against their number, and the slow start of a looped model."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from yoco_u.experiment.findings.verdicts import (
    OPEN,
    Outcome,
    Verdict,
    all_negative,
    choice_text,
    difference_text,
    loss_text,
    of_sign,
    together,
)
from yoco_u.experiment.intervals import Interval, NotDecidable, difference, interval
from yoco_u.experiment.results import Results, Series, best
from yoco_u.formatting import short_count
from yoco_u.report.comparison import equal_cost

EARLY = 0.25
"""Share of a run's tokens after which the slow start is measured."""


def falls_with_loops(results: Results) -> Outcome:
    """The loss at each loop count against the loss at the next smaller one."""
    ladder = _ladder(results)
    steps = [(low, high, difference(ladder[high].final, ladder[low].final)) for low, high in _rungs(ladder)]
    losses = ", ".join(f"T={loops} {loss_text(series.loss)}" for loops, series in ladder.items())
    text = [f"After {short_count(next(iter(ladder.values())).tokens)} tokens: {losses}."]
    text += [f"T={low} to {high}: {difference_text(found)}." for low, high, found in steps]
    numbers = {f"T={low} to {high}": found for low, high, found in steps}
    return Outcome(all_negative([*numbers.values()]), " ".join(text) + choice_text(*ladder.values()), numbers)


def each_by_less(results: Results) -> Outcome:
    """The gain per further loop, from each loop count to the next, against the gain before it."""
    ladder = _ladder(results)
    seeds = set.intersection(*(set(series.final) for series in ladder.values()))
    if not seeds:
        raise NotDecidable("the loop counts have no seed in common")
    gains = [
        {seed: (ladder[low].final[seed] - ladder[high].final[seed]) / (high - low) for seed in seeds}
        for low, high in _rungs(ladder)
    ]
    names = [f"{low} to {high}" for low, high in _rungs(ladder)]
    changes, text, numbers = list[Interval](), [], {}
    for name, gain in zip(names, gains, strict=True):
        numbers[f"gain per loop, T={name}"] = interval(list(gain.values()))
    told = ", ".join(f"T={name} {interval(list(gain.values())).mean:.4f}" for name, gain in zip(names, gains, strict=True))
    text.append(f"Nats gained by each loop more: {told}.")
    for i in range(len(gains) - 1):
        found = difference(gains[i + 1], gains[i])
        changes.append(found)
        text.append(f"The gain of T={names[i + 1]} minus that of T={names[i]}: {difference_text(found)}.")
    return Outcome(all_negative(changes), " ".join(text) + choice_text(*ladder.values()), numbers)


def _ladder(results: Results) -> dict[int, Series]:
    """The best series of each loop count, at the largest number of tokens that three counts have. YOCO counts as one loop."""
    found = [*results.of_role("yoco_u"), *results.of_role("yoco")]
    for tokens in sorted({series.tokens for series in found}, reverse=True):
        there = [series for series in found if equal_cost(series.tokens, tokens)]
        counts = sorted({series.loops for series in there})
        if len(counts) >= 3:
            return {loops: best(series for series in there if series.loops == loops) for loops in counts}
    raise NotDecidable("fewer than three loop counts are finished at equal tokens")


def _rungs(ladder: dict[int, Series]) -> list[tuple[int, int]]:
    """The loop counts as pairs of neighbours."""
    return list(pairwise(ladder))


def early_lag(results: Results) -> Outcome:
    """The plain loop's lag behind YOCO early in training, and how much of it each remedy removes.

    Remedies are the tamed loops, and a YOCO-U of the same loop count beside a plain loop.

    Raises:
        NotDecidable: if a model that this needs is not finished, or was not evaluated early.
    """
    plain, yoco = _plain_loop_and_yoco(results)
    tamed = [*results.of_role("tamed_loop"), *results.of_role("yoco_u", plain.loops)]
    remedies = [series for series in tamed if equal_cost(series.tokens, plain.tokens) and series.name != plain.name]
    if not remedies:
        raise NotDecidable("no loop with a remedy is finished at the tokens of the plain one")
    tokens = EARLY * plain.tokens

    def early(series: Series) -> dict[int, float]:
        return {seed: loss for seed, [loss] in series.at("tokens", [tokens]).items()}

    lag, end = difference(early(plain), early(yoco)), difference(plain.final, yoco.final)
    text = [
        f"The plain loop minus YOCO: {difference_text(lag)} after {short_count(tokens)} tokens, {difference_text(end)} after "
        f"{short_count(plain.tokens)}."
    ]
    numbers: dict[str, Any] = {"plain minus YOCO": {"early": lag, "end": end}}
    gains = list[Interval]()
    for series in sorted(remedies, key=lambda series: series.loss.mean):
        gain, final = difference(early(series), early(plain)), difference(series.final, plain.final)
        left, left_at_end = difference(early(series), early(yoco)), difference(series.final, yoco.final)
        gains.append(gain)
        numbers[series.label] = {
            "early, minus plain": gain,
            "end, minus plain": final,
            "early, minus YOCO": left,
            "end, minus YOCO": left_at_end,
        }
        text.append(
            f"With {series.label}: {_removes(lag, gain)}{difference_text(gain)} against the plain loop early, "
            f"{difference_text(final)} at the end ({difference_text(left_at_end)} against YOCO)."
        )
    return Outcome(together([of_sign(-lag, 2), _one_helps(gains)]), " ".join(text) + choice_text(plain, yoco), numbers)


def _one_helps(gains: Sequence[Interval]) -> Verdict:
    """Whether one of several remedies lowers the loss: by an interval that holds among all of them (Holm's first step).

    It is refuted if all raise it, which, with the lag, is one of two parts that would refute the finding.
    """
    if any(of_sign(gain.among(len(gains))) == "confirmed" for gain in gains):
        return "confirmed"
    return "not confirmed" if all(of_sign(gain, 2) == "not confirmed" for gain in gains) else OPEN


def _plain_loop_and_yoco(results: Results) -> tuple[Series, Series]:
    """The plain loop and YOCO, at the most tokens that both have.

    If no model has the role `plain_loop`, a YOCO-U without gates at the remedies' loop count stands for it.
    """
    pairs = results.pairs("plain_loop", "yoco", "tokens")
    if not pairs and (tamed := results.of_role("tamed_loop")):
        pairs = [pair for pair in results.pairs("yoco_u", "yoco", "tokens", tamed[-1].loops) if not pair[0].gated]
    if not pairs:
        raise NotDecidable("no plain loop beside a YOCO of equal tokens is finished")
    return pairs[-1]


def _removes(lag: Interval, gain: Interval) -> str:
    """The share of the lag that a gain removes, as the beginning of a sentence; empty if there is no certain lag."""
    return f"{-gain.mean / lag.mean:.0%} of the early lag removed, " if lag.low is not None and lag.low > 0 else ""
