"""Tests of the findings that compare YOCO-U with other architectures: at equal steps, FLOPs or loss, and by rank."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from yoco_u import paper
from yoco_u.experiment.config import Role
from yoco_u.experiment.findings.verdicts import (
    OPEN,
    Outcome,
    Verdict,
    all_negative,
    choice_text,
    difference_text,
    loss_text,
    no_interval,
    of_sign,
    trend_text,
)
from yoco_u.experiment.intervals import (
    Interval,
    NotDecidable,
    Trend,
    difference,
    first_reach,
    gap_trend,
    interval,
    simultaneous_half_width,
)
from yoco_u.experiment.results import Cost, Results, Series, best, gaps_by_seed
from yoco_u.formatting import short_count
from yoco_u.report.comparison import equal_cost

PAPER_TIE = 0.01
"""Share by which two perplexities of the paper may differ and still count as equal; the order of such a pair is not judged."""

PAR = 0.02
"""Nats per token within which two losses are on a par."""

_UNITS: dict[Cost, str] = {"tokens": "tokens", "flops": "FLOPs"}

TREND_FROM = 0.25
"""Share of a run's tokens after which its curve counts for a trend; before that the loss falls too steeply."""


def paper_loops(results: Results) -> int:
    """The loop count at which YOCO-U is compared with others: the paper's if the grid has it, otherwise the largest.

    Raises:
        NotDecidable: if no YOCO-U with a loop is finished.
    """
    counts = {series.loops for series in results.of_role("yoco_u")} - {1}
    if not counts:
        raise NotDecidable("no YOCO-U is finished")
    return paper.LOOPS if paper.LOOPS in counts else max(counts)


def _pairs(results: Results, role: Role, name: str, equal: Cost = "tokens") -> list[tuple[Series, Series]]:
    """YOCO-U at `paper_loops`, and another role, where they spent equal tokens or FLOPs, most tokens last.

    Raises:
        NotDecidable: if there is none; `name` is what the message calls the role.
    """
    pairs = results.pairs("yoco_u", role, equal, paper_loops(results))
    if not pairs:
        raise NotDecidable(f"no {name} with the {_UNITS[equal]} of a YOCO-U is finished")
    return pairs


def equal_tokens(results: Results) -> Outcome:
    """YOCO-U against YOCO after equal numbers of tokens."""
    return _against_yoco(results, "tokens")


def equal_flops(results: Results) -> Outcome:
    """YOCO-U against YOCO after equal FLOPs of training."""
    return _against_yoco(results, "flops")


def _against_yoco(results: Results, equal: Cost) -> Outcome:
    pairs = _pairs(results, "yoco", "YOCO", equal)
    looped, plain = pairs[-1]
    found = difference(looped.final, plain.final)
    text = [
        f"{looped.label} {loss_text(looped.loss)}, {plain.label} {loss_text(plain.loss)} nats per token, after "
        f"{short_count(looped.tokens)} and {short_count(plain.tokens)} tokens ({looped.tokens / looped.parameters:.0f} per "
        f"parameter): {difference_text(found)}."
    ]
    numbers: dict[str, Any] = {"difference": found, "gaps": [_gap(*pair) for pair in pairs]}
    try:
        trend = trend_of(pairs, equal)
    except NotDecidable:
        trend = None
    if trend is not None:
        text.append(trend_text(trend, found.mean, _UNITS[equal]))
        numbers["trend"] = trend
    return Outcome(of_sign(found), " ".join(text) + choice_text(looped, plain), numbers)


def _gap(series: Series, other: Series) -> dict[str, Any]:
    return {
        "tokens": series.tokens,
        "flops": series.flops,
        "other_tokens": other.tokens,
        "difference": difference(series.final, other.final),
    }


def trend_of(pairs: Sequence[tuple[Series, Series]], x: Cost) -> Trend:
    """How the gap between two models changes: over three budgets or more, otherwise along the runs of the last pair.

    Along two runs of equal cost the gap is fair at every point, as both have done the same share of their schedules.

    Args:
        pairs: the two series of each budget, the largest budget last.
        x: what the budgets are counted in.

    Raises:
        NotDecidable: if there are too few points.
    """
    if len(pairs) >= 3 and (gaps := gaps_by_seed(pairs)):
        return gap_trend([getattr(a, x) for a, _ in pairs], gaps)
    series, other = pairs[-1]
    xs = [getattr(point, x) for point in next(iter(series.curves.values()))]
    xs = [value for value in xs if value >= TREND_FROM * xs[-1]]
    losses, others = series.at(x, xs), other.at(x, xs)
    gaps = [np.subtract(losses[seed], others[seed]).tolist() for seed in sorted(losses.keys() & others.keys())]
    return gap_trend(xs, gaps)


def tokens_to_equal_loss(results: Results) -> Outcome:
    """The share of YOCO's tokens that YOCO-U saves on its way down to YOCO's final loss.

    Where a seed does not reach it there is no share to take an interval of: then the final losses say whether it is refuted.
    """
    pairs = _pairs(results, "yoco", "YOCO")
    looped, plain = pairs[-1]
    over_budgets = len(pairs) >= 3
    seeds = sorted(looped.final.keys() & plain.final.keys())
    needed = {}
    for seed in seeds:
        if over_budgets:
            points = [(a.tokens, a.final[seed]) for a, _ in pairs if seed in a.final]
        else:
            points = [(point.tokens, point.loss) for point in looped.curves[seed]]
        tokens, losses = zip(*points, strict=True)
        needed[seed] = first_reach(tokens, losses, plain.final[seed])
    how = (
        "Over runs of different lengths, each with a schedule of its own."
        if over_budgets
        else "Along the runs: before its own end YOCO-U has not decayed its learning rate, so this understates it."
    )
    reached = {seed: tokens for seed, tokens in needed.items() if tokens is not None}
    numbers: dict[str, Any] = {"tokens_needed": needed, "tokens_of_yoco": plain.tokens}
    if len(reached) < len(seeds):
        share = f"{len(reached)} of {len(seeds)} seeds"
        text = f"YOCO-U reaches the final loss of YOCO within its {short_count(looped.tokens)} tokens in {share}. {how}"
        numbers["difference"] = found = difference(looped.final, plain.final)
        text = f"{text} At the end: {difference_text(found)}.{choice_text(looped, plain)}"
        return Outcome("not confirmed" if of_sign(found) == "not confirmed" else OPEN, text, numbers)
    saving = interval([1 - tokens / plain.tokens for tokens in reached.values()])
    numbers["saving"] = saving
    bounds = no_interval(saving) if saving.low is None else f"95%: {saving.low:.0%} to {saving.high:.0%}"
    text = (
        f"YOCO-U needs {saving.mean:.0%} fewer tokens than the {short_count(plain.tokens)} of YOCO ({bounds}); the paper found "
        f"{paper.TOKEN_SAVING:.0%}. {how}{choice_text(looped, plain)}"
    )
    return Outcome(of_sign(-saving), text, numbers)


def order(results: Results) -> Outcome:
    """Our order of every two architectures whose perplexities in the paper differ.

    The finding is refuted if one pair has the opposite order here, and confirmed if most pairs can be told apart and none has.
    """
    ranked = _at_equal_tokens(results)
    half = simultaneous_half_width([series.final for series in ranked.values()])
    agree, contradict, open_ = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    for low, high in combinations(sorted(ranked, key=lambda role: paper.WIKITEXT_PERPLEXITY[role]), 2):
        if paper.WIKITEXT_PERPLEXITY[high] / paper.WIKITEXT_PERPLEXITY[low] - 1 <= PAPER_TIE:
            continue
        found = difference(ranked[low].final, ranked[high].final)
        pair = {"lower_in_paper": low, "higher_in_paper": high, "difference": found.mean}
        (open_ if abs(found.mean) <= half else agree if found.mean < 0 else contradict).append(pair)
    tau = float(
        kendalltau([paper.WIKITEXT_PERPLEXITY[role] for role in ranked], [s.loss.mean for s in ranked.values()]).statistic
    )
    ours = ", ".join(f"{s.label} {s.loss.mean:.4f}" for s in sorted(ranked.values(), key=lambda s: s.loss.mean))
    against = f" ({_pairs_text(contradict, ranked)})" if contradict else ""
    text = (
        f"From low to high loss: {ours}. Differences of over {half:.4f} nats count, at 95% for all pairs together. Of the "
        f"pairs that differ by over {PAPER_TIE:.0%} in the paper, {len(agree)} come out in its order, {len(contradict)} in "
        f"the opposite one{against}, {len(open_)} cannot be told apart. Kendall's tau with the paper's order is {tau:.2f} "
        f"(1 is the same order).{choice_text(*ranked.values())}"
    )
    numbers = {"agree": agree, "contradict": contradict, "open": open_, "half_width": half, "kendall_tau": tau}
    held: Verdict = "confirmed" if len(agree) > len(open_) else OPEN
    return Outcome("not confirmed" if contradict else held, text, numbers)


def _pairs_text(pairs: Sequence[dict[str, Any]], ranked: dict[paper.Name, Series]) -> str:
    return ", ".join(f"{ranked[p['higher_in_paper']].label} below {ranked[p['lower_in_paper']].label}" for p in pairs)


def _at_equal_tokens(results: Results) -> dict[paper.Name, Series]:
    """The best series of each of the paper's architectures, at the largest number of tokens that three of them have."""
    candidates: dict[paper.Name, list[Series]] = {role: results.of_role(role) for role in paper.WIKITEXT_PERPLEXITY}
    if candidates["yoco_u"]:
        loops = paper_loops(results)
        candidates["yoco_u"] = results.of_role("yoco_u", loops)
    for tokens in sorted({series.tokens for found in candidates.values() for series in found}, reverse=True):
        there = {role: [s for s in found if equal_cost(s.tokens, tokens)] for role, found in candidates.items()}
        ranked = {role: best(found) for role, found in there.items() if found}
        if len(ranked) >= 3:
            return ranked
    raise NotDecidable("fewer than three of the paper's architectures are finished at equal tokens")


def lower_half(results: Results) -> Outcome:
    """YOCO-U, which loops the lower half, against looping the upper half, with shared KV and without."""
    compared, text, numbers = list[Series](), [], dict[str, Interval]()
    roles: tuple[Role, ...] = ("upper_loop", "upper_loop_without_shared_kv")
    for role in roles:
        lower, upper = _pairs(results, role, role.replace("_", " "))[-1]
        found = difference(lower.final, upper.final)
        compared += (lower, upper)
        text.append(f"{lower.label} {loss_text(lower.loss)}, {upper.label} {loss_text(upper.loss)}: {difference_text(found)}.")
        numbers[role] = found
    return Outcome(all_negative([*numbers.values()]), " ".join(text) + choice_text(*compared), numbers)


def on_a_par_with_rins(results: Results) -> Outcome:
    """YOCO-U against RINS: confirmed if the whole interval of their difference lies within `PAR` of zero."""
    ours, rins = _pairs(results, "rins", "RINS")[-1]
    found = difference(ours.final, rins.final)
    text = (
        f"{ours.label} {loss_text(ours.loss)}, {rins.label} {loss_text(rins.loss)}: {difference_text(found)}. On a par means "
        f"an interval within {PAR} nats of zero.{choice_text(ours, rins)}"
    )
    verdict: Verdict = OPEN
    if found.low is not None and found.high is not None:
        if found.low > -PAR and found.high < PAR:
            verdict = "confirmed"
        elif found.low > PAR or found.high < -PAR:
            verdict = "not confirmed"
    return Outcome(verdict, text, {"difference": found})
