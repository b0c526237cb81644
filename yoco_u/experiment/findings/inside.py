"""Tests of the findings beyond the loss: angular distances inside the model, and needles far behind the window."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yoco_u.experiment.config import Role
from yoco_u.experiment.findings.comparisons import paper_loops
from yoco_u.experiment.findings.verdicts import (
    OPEN,
    Outcome,
    Verdict,
    all_negative,
    choice_text,
    difference_text,
    of_sign,
    together,
)
from yoco_u.experiment.intervals import (
    Interval,
    NotDecidable,
    Share,
    correlation_z,
    interval,
    share_difference,
    share_interval,
)
from yoco_u.experiment.results import Results, Series, best

FOUND = 0.9
"""The least recall at which a model counts as finding needles."""

FAR = 0.5
"""The greatest depth, as a share of the length, at which a needle counts as far behind the window."""


def angular(results: Results) -> Outcome:
    """The paper's Figure 8: each loop repeats the pattern of the last, smaller, and the cross-decoder begins with a jump."""
    loops = paper_loops(results)
    series = _measured(results.of_role("yoco_u", loops), "angular")
    looped, other = _by_loop(series)
    means = {seed: found.mean(axis=1) for seed, found in looped.items()}
    text, numbers = list[str](), dict[str, Interval]()
    shown = np.mean(list(looped.values()), axis=0)
    text.append(f"{series.label}: " + "; ".join(f"loop {t} {_row(row)}" for t, row in enumerate(shown, start=1)))
    text.append(f"; cross-decoder {_row(np.mean(list(other.values()), axis=0))} half turns, layer by layer. ")

    judged = list[Interval]()

    def claim(name: str, claimed_negative: Interval, shown: str, scale: Callable[[float], float] = float) -> None:
        numbers[name] = claimed_negative.map(scale)
        judged.append(claimed_negative)
        text.append(shown)

    if shown.shape[1] >= 3:
        z = correlation_z([_alikeness(found) for found in looped.values()])
        alike = f"Correlation of a loop's pattern with the next: {_plain(z.map(math.tanh))}. "
        claim("alikeness of loops, negated", -z, alike, math.tanh)
    for t in range(loops - 1):
        change = interval([float(mean[t + 1] - mean[t]) for mean in means.values()])
        claim(f"loop {t + 2} minus loop {t + 1}", change, f"Loop {t + 2} minus loop {t + 1}: {difference_text(change)}. ")
    jump = interval([float(other[seed][0] - looped[seed][-1, -1]) for seed in looped])
    claim(
        "jump at the border, negated",
        -jump,
        f"From the last looped to the first cross layer: {difference_text(jump)}.",
    )
    return Outcome(all_negative(judged), "".join(text) + choice_text(series), numbers)


def _measured(candidates: list[Series], measure: str) -> Series:
    """The best of the series that have this measure.

    Raises:
        NotDecidable: if none has it.
    """
    found = [series for series in candidates if any(measure in taken for taken in series.measures.values())]
    if not found:
        raise NotDecidable(f"an architecture that this needs has no measures.{measure}")
    return best(found)


def _by_loop(series: Series) -> tuple[dict[int, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
    """Angular distances by seed: of the looped stage, (loops, layers), and of the layers after it, (layers,)."""
    looped, other, layers = {}, {}, series.layers[0]
    for seed, measures in series.measures.items():
        if "angular" in measures:
            found = np.asarray(measures["angular"]["layers"])
            looped[seed] = found[: series.loops * layers].reshape(series.loops, layers)
            other[seed] = found[series.loops * layers :]
    return looped, other


def _alikeness(found: NDArray[np.float64]) -> float:
    """The mean correlation of each loop's pattern with the next one's; `found` is (loops, layers).

    Raises:
        NotDecidable: if the distances of a loop are all equal, but for rounding.
    """
    if (np.ptp(found, axis=1) <= 1e-6 * np.abs(found).max(axis=1)).any():
        raise NotDecidable("the angular distances within a loop are all equal, so that they have no pattern")
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairwise(found)]))


def _row(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _plain(found: Interval) -> str:
    return f"{found.mean:.2f}" + ("" if found.low is None else f" (95%: {found.low:.2f} to {found.high:.2f})")


def retrieval(results: Results) -> Outcome:
    """The recall of needles in the first half of the longest texts: three architectures against a model of windows alone."""
    roles: tuple[Role, ...] = ("window_only", "transformer", "yoco", "yoco_u")
    chosen = {role: _measured(results.of_role(role), "needles") for role in roles}
    lengths = set.intersection(*({score["length"] for score in series.needles} for series in chosen.values()))
    if not lengths:
        raise NotDecidable("the models were not asked for needles of one length")
    length = max(lengths)
    recalls = {role: _recall(series, length) for role, series in chosen.items()}
    shares = {role: share_interval(list(found.values())) for role, found in recalls.items()}
    text = [f"Needles in the first half of {length:,} tokens, share that is found: "]
    text.append("; ".join(f"{chosen[role].label} {_plain(share)}" for role, share in shares.items()))
    verdicts, numbers = list[Verdict](), dict[str, Any]()
    for role, found in recalls.items():
        numbers[role] = shares[role]
        if role != "window_only":
            missed = share_difference(recalls["window_only"], found)
            numbers[f"window_only minus {role}"] = missed
            beaten = of_sign(missed, len(roles) - 1)
            verdicts.append(OPEN if beaten == "confirmed" and numbers[role].mean < FOUND else beaten)
    text.append(f". Found means a share of {FOUND:.0%} or more, and more than by windows alone in every interval.")
    return Outcome(together(verdicts), "".join(text) + choice_text(*chosen.values()), numbers)


def _recall(series: Series, length: int) -> dict[int, Share]:
    """Needles found far behind the window in texts of this length, of all that were asked for, by seed."""
    found = {}
    for seed, measures in series.measures.items():
        scores = [score for score in measures.get("needles", []) if score["length"] == length and score["depth"] <= FAR]
        if scores:
            asked = sum(score["samples"] for score in scores)
            found[seed] = Share(round(sum(score["recall"] * score["samples"] for score in scores)), asked)
    return found
