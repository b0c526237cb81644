"""The findings on drawn loop counts, on made-up losses at several of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from made_up_grids import finals, grid, preset, results_of
from test_findings import OPEN, outcome

from yoco_u.experiment.results import Results


def with_losses(results: Results, losses: dict[str, dict[int, float]]) -> Results:
    """The results, as if models had been evaluated at other loop counts in the end: by series, noisy from seed to seed."""
    series = []
    for one in results.series:
        curves = {}
        for seed, curve in one.curves.items():
            given = losses.get(one.name, {})
            off: dict[int, float | None] = {t: loss + 0.05 * seed + 0.0002 * ((seed * t) % 3) for t, loss in given.items()}
            curves[seed] = (*curve[:-1], replace(curve[-1], at_loops=off))
        series.append(replace(one, curves=curves))
    return replace(results, series=tuple(series))


DIAL = {1: 2.51, 2: 2.45, 5: 2.40, 8: 2.41}
EVERY_T = {f"yoco-u_loops-{t}": loss for t, loss in ((1, 2.5), (2, 2.44), (3, 2.4), (5, 2.39))}
DRAWN = {"settings": preset("yoco_u")["settings"] | {"training": {"loop_draw": {"most": 5}}}, "role": "drawn_loops"}
DIAL_MODELS = {"yoco-u": preset("yoco_u", vary={"architecture.loops": [1, 2, 3, 5]}), "drawn": DRAWN, "worse": DRAWN}


@pytest.mark.parametrize(
    ("at_loops", "own", "spread", "one_model", "beyond"),
    [
        (DIAL, 2.41, 0.001, "confirmed", "confirmed"),
        (DIAL | {1: 2.6}, 2.41, 0.001, "not confirmed", "confirmed"),
        (DIAL | {8: 2.9}, 2.41, 0.001, "confirmed", "not confirmed"),
        (DIAL, 2.39, 0.04, OPEN, OPEN),
    ],
)
def test_one_model_for_every_loop_count(
    dial: Callable[[float, float], Results], at_loops: dict[int, float], own: float, spread: float, one_model: str, beyond: str
) -> None:
    plain = dial(own, spread)
    assert outcome(plain, "drawn-loops").text.startswith("Drawn was not evaluated at T = 1, 2 (")
    assert outcome(plain, "beyond-three").text.startswith("Drawn was not evaluated at T = 5, 8 (")
    results = with_losses(plain, {"drawn": at_loops, "worse": at_loops, "yoco-u_loops-3": {1: 4.0, 2: 3.0, 5: 2.8, 8: 3.4}})
    found, after = outcome(results, "drawn-loops"), outcome(results, "beyond-three")
    assert (found.verdict, after.verdict) == (one_model, beyond)
    assert found.numbers["drawn"]["T=1"].mean == pytest.approx(at_loops[1] - 2.5, abs=2 * spread)
    assert found.numbers["worse"]["T=3"].mean == pytest.approx(0.3, abs=2 * spread)
    assert "T=8" not in found.numbers["drawn"]  # no model was trained at 8 alone
    assert after.numbers["drawn"]["T=8"].mean == pytest.approx(at_loops[8] - own, abs=2 * spread)
    assert after.numbers["yoco-u, loops 3"]["T=8"].mean == pytest.approx(1.0, abs=2 * spread)
    assert "drawn, minus its own T=3" in after.text


@pytest.mark.parametrize(("best", "worse", "one_model", "beyond"), [
    ({8: None}, {}, "confirmed", "not confirmed"),
    ({2: None}, {}, "not confirmed", "confirmed"),
    ({}, {1: None, 5: None}, "confirmed", "confirmed"),
    ({8: "missing"}, {}, "confirmed", OPEN),
    ({}, {1: "missing", 8: "missing"}, "confirmed", "confirmed"),
])  # fmt: skip
@pytest.mark.parametrize("seeds", [{1}, {0, 1, 2}])
def test_losses_that_are_not_finite_are_worse_and_those_not_asked_for_are_not_judged(
    dial: Callable[[float, float], Results],
    best: dict[int, Any],
    worse: dict[int, Any],
    one_model: str,
    beyond: str,
    seeds: set[int],
) -> None:
    """The best model alone is judged, at those loop counts alone that a finding is about."""
    series = []
    for one in with_losses(dial(2.41, 0.001), {"drawn": DIAL, "worse": DIAL}).series:
        changes, curves = {"drawn": best, "worse": worse}.get(one.name, {}), {}
        for seed, curve in one.curves.items():
            known = {t: None if t in changes and seed in seeds else loss for t, loss in curve[-1].at_loops.items()}
            asked = {t: loss for t, loss in known.items() if changes.get(t) != "missing"}
            curves[seed] = (*curve[:-1], replace(curve[-1], at_loops=asked))
        series.append(replace(one, curves=curves))
    results = replace(dial(2.41, 0.001), series=tuple(series))
    found, after = outcome(results, "drawn-loops"), outcome(results, "beyond-three")
    assert (found.verdict, after.verdict) == (one_model, beyond)
    assert (None in (best | worse).values()) == ("not finite" in found.text + after.text)


@pytest.fixture(scope="module")
def dial(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float, float], Results]:
    """Results with the final losses of `EVERY_T`, of the best drawn model `own`, and of a worse one."""

    @cache
    def of(own: float, spread: float) -> Results:
        losses = EVERY_T | {"drawn": own, "worse": 2.7}
        return results_of(grid(DIAL_MODELS), tmp_path_factory.mktemp("grid"), finals(losses, spread))

    return of
