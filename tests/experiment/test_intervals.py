"""Intervals against their formula written out, fits and crossings against laws that are known."""

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from yoco_u.experiment.findings.loops import _one_helps
from yoco_u.experiment.findings.verdicts import Verdict, all_negative, of_sign
from yoco_u.experiment.intervals import (
    NotDecidable,
    Share,
    correlation_z,
    difference,
    first_reach,
    fit_power_law,
    fit_power_laws,
    gap_trend,
    interval,
    share_difference,
    share_interval,
    simultaneous_half_width,
)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_an_interval_is_students(values: list[float]) -> None:
    """The mean, plus and minus the t quantile times the standard error."""
    found, count = interval(values), len(values)
    mean = math.fsum(values) / count
    assert found.mean == pytest.approx(mean, abs=1e-12)
    if np.ptp(values) > 1e-6:
        error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
        half = stats.t.ppf(0.975, count - 1) * error
        assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-9)
        three = mean + stats.t.ppf(1 - 0.025 / 3, count - 1) * error
        assert found.among(3).high == pytest.approx(three, abs=1e-9) and found.among(1) == found
    assert found.count == count


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.1] * 3, [0.0] * 4, [0.1 + 0.2, 0.3]])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    """A spread of 0 over a few seeds says nothing of their spread, so that it must not decide."""
    found = interval(values)
    assert found.mean == pytest.approx(values[0])
    assert found.low is None and found.high is None and found.count == len(values)
    assert of_sign(difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 9.0))) not in get_args(Verdict)[:2]


def test_the_interval_of_a_table() -> None:
    """t of 2 degrees of freedom at 97.5% is 4.303 in every table."""
    found = interval([1.0, 2.0, 3.0])
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)


@pytest.mark.parametrize("parts", [5, 12])
def test_a_claim_of_many_parts_that_are_nothing_is_seldom_refuted(parts: int) -> None:
    generator, refuted, helped, grids = np.random.default_rng(parts), 0, 0, 120
    for _ in range(grids):
        found = [interval(generator.normal(0, 1, 4).tolist()) for _ in range(parts)]
        refuted += all_negative(found) == "not confirmed"
        helped += _one_helps(found) == "confirmed"
    assert refuted / grids < 0.08 and helped / grids < 0.08


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    assert (interval([2.5]).mean, interval([2.5]).low, interval([2.5]).high) == (2.5, None, None)
    with pytest.raises(NotDecidable):
        interval([])


@given(st.lists(st.floats(-5, 5), max_size=4), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 4))
def test_a_value_that_is_not_finite_decides_nothing(values: list[float], bad: float, place: int) -> None:
    values.insert(place, bad)
    with pytest.raises(NotDecidable, match="no finite value"):
        interval(values)
    with pytest.raises(NotDecidable, match="no finite value"):
        difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 1.0))


def test_differences_are_paired_by_seed() -> None:
    a, b = {0: 1.0, 1: 2.0, 2: 3.0}, {1: 2.5, 2: 3.4, 9: 100.0}
    found = difference(a, b)
    paired = stats.ttest_rel([2.0, 3.0], [2.5, 3.4]).confidence_interval(0.95)
    assert found.mean == pytest.approx(-0.45)
    assert (found.low, found.high) == pytest.approx(tuple(paired))
    assert -found == difference(b, a)
    with pytest.raises(NotDecidable, match="no seed in common"):
        difference({0: 1.0}, {1: 1.0})


def test_shares_that_all_seeds_agree_in_have_the_interval_of_their_counts() -> None:
    """Newcombe's example 56 of 70 against 48 of 80 (Statistics in Medicine 17, 1998): 0.0524 to 0.3339."""
    everything = share_interval([Share(60, 60)] * 3)
    assert everything.mean == 1 == pytest.approx(everything.high)
    assert everything.low == pytest.approx(180 / (180 + stats.norm.ppf(0.975) ** 2))
    found = share_difference({0: Share(28, 35), 1: Share(28, 35)}, {0: Share(24, 40), 1: Share(24, 40)})
    assert [found.mean, found.low, found.high] == pytest.approx([0.2, 0.0524, 0.3339], abs=1e-4)
    assert share_interval([Share(3, 4)]).low is None
    spread = [Share(28, 100), Share(80, 100), Share(95, 100)]
    students = interval([share.value for share in spread])
    assert share_interval(spread).low == max(0.0, students.low or 0.0) and share_interval(spread).high == 1.0


@pytest.mark.parametrize(("rate", "between"), [(0.98, 0.0), (0.5, 0.0), (0.5, 0.2)])
def test_the_interval_of_a_share_covers_it_whether_seeds_differ_or_not(rate: float, between: float) -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        rates = rate + between * generator.uniform(-1, 1, 3)
        found = share_interval([Share(int(generator.binomial(60, one)), 60) for one in rates])
        covered += found.low is not None and found.high is not None and found.low <= rate <= found.high
    assert covered >= 0.92 * 200


def test_the_interval_of_a_correlation_is_fishers() -> None:
    z = [math.atanh(0.5), math.atanh(0.8), math.atanh(0.9)]
    low, high = stats.ttest_1samp(z, 0).confidence_interval(0.95)
    found = correlation_z([0.5, 0.8, 0.9])
    assert (found.low, found.high) == pytest.approx((low, high))
    assert math.isfinite(correlation_z([1.0, -0.2, 0.3]).low or math.nan)


def test_of_two_models_the_simultaneous_interval_is_the_paired_one() -> None:
    generator = np.random.default_rng(1)
    a, b = ({seed: float(value) for seed, value in enumerate(generator.normal(3, 1, 5))} for _ in range(2))
    found = difference(a, b)
    assert found.high is not None
    assert simultaneous_half_width([a, b]) == pytest.approx(found.high - found.mean, rel=1e-4)


def test_simultaneous_intervals_hold_for_all_pairs_at_once() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(60):
        seeds = generator.normal(0, 1, 4)
        losses = [dict(enumerate((seeds + generator.normal(0, 0.1, 4)).tolist())) for _ in range(6)]
        means = [float(np.mean(list(loss.values()))) for loss in losses]
        held += max(means) - min(means) <= simultaneous_half_width(losses)
    assert 50 <= held < 60
    with pytest.raises(NotDecidable, match="two seeds"):
        simultaneous_half_width([{0: 1.0, 1: 2.0}, {1: 1.0}])
    with pytest.raises(NotDecidable, match="nothing of the noise"):
        simultaneous_half_width([{0: 3.0, 1: 3.5}, {0: 2.6, 1: 3.1}])


def test_first_reach_is_exact_where_loss_is_straight_in_log_tokens() -> None:
    x = [100.0 * 2**i for i in range(6)]
    losses = [5 - 0.3 * math.log(v) for v in x]
    for target in (losses[0] - 0.01, 3.1, losses[-1] + 1e-9):
        assert first_reach(x, losses, target) == pytest.approx(math.exp((5 - target) / 0.3))
    assert first_reach(x, losses, losses[-1] - 0.01) is None
    assert first_reach(x, losses, 10) == x[0]
    assert first_reach([1, 2, 4, 8], [3.0, 2.0, 2.5, 1.0], 2.0) == 2


@given(st.floats(0.5, 3), st.floats(0.15, 0.8), st.floats(0.5, 3))
def test_a_power_law_is_found_again(floor: float, exponent: float, drop: float) -> None:
    x = np.geomspace(1e6, 1e9, 8)
    scale = drop * 1e6**exponent
    law = fit_power_law(x.tolist(), (floor + scale * x**-exponent).tolist())
    assert law.floor == pytest.approx(floor, rel=1e-2)
    assert law.exponent == pytest.approx(exponent, rel=1e-2)
    assert law(3e7) == pytest.approx(floor + scale * 3e7**-exponent, rel=1e-3)


def test_the_intervals_of_a_fit_cover_the_truth_as_often_as_they_say() -> None:
    """Seeds differ by more than their points stray, so that the points of one seed are not independent."""
    generator, covered = np.random.default_rng(0), 0
    x = np.geomspace(1e6, 1e8, 5)
    for _ in range(16):
        floors = {seed: float(generator.normal(1.5, 0.05)) for seed in range(3)}
        points = {
            seed: [(v, floor + 40 * v**-0.25 + float(generator.normal(0, 0.002))) for v in x] for seed, floor in floors.items()
        }
        laws = fit_power_laws(points)
        assert laws.floor.mean == pytest.approx(np.mean([law.floor for law in laws.by_seed.values()]))
        assert laws.floor.low is not None and laws.floor.high is not None
        covered += laws.floor.low <= 1.5 <= laws.floor.high
    assert covered >= 14


def test_a_seed_with_too_few_budgets_is_left_out_and_one_alone_has_no_interval() -> None:
    points = [(x, 2 + 30 * x**-0.3) for x in (1e6, 2e6, 4e6, 1e7)]
    laws = fit_power_laws({0: points, 1: points[:3]})
    assert [*laws.by_seed] == [0] and laws.budgets == 4 and laws.floor.low is None and laws.exponent.count == 1
    with pytest.raises(NotDecidable, match="there are 3"):
        fit_power_laws({0: points[:2], 1: points[:3]})


@pytest.mark.parametrize(
    ("x", "losses", "reason"),
    [
        ([1e6] * 5 + [2e6, 4e6], [3.0] * 7, "4 or more budgets, there are 3"),
        ([1e6, 2e6, 4e6, 8e6, 16e6], [3.0, 3.01, 2.99, 3.0, 3.0], "does not bend|no power law"),
        ([1e6, 2e6, 4e6, 8e6, 16e6], [3.0, 2.8, 2.6, 2.4, 2.2], "does not bend|no power law"),
    ],
)
def test_points_that_carry_no_fit(x: list[float], losses: list[float], reason: str) -> None:
    with pytest.raises(NotDecidable, match=reason):
        fit_power_law(x, losses)


def test_a_gap_that_closes_crosses_where_its_line_does() -> None:
    x = [1e6, 2e6, 4e6, 8e6]
    gaps = [[0.4 - (0.1 + shift) * math.log2(v / 1e6) for v in x] for shift in (0.0, 0.002, -0.002)]
    trend = gap_trend(x, gaps)
    assert trend.per_doubling.mean == pytest.approx(-0.1)
    assert trend.crossing is not None
    assert trend.crossing.mean == pytest.approx(16e6, rel=1e-3)
    assert trend.crossing.low is not None
    assert trend.crossing.low < 16e6 < (trend.crossing.high or 0)


@given(gaps=st.lists(st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4), min_size=2, max_size=4), falls=st.floats(0, 1))
def test_a_crossing_lies_beyond_the_last_point(gaps: list[list[float]], falls: float) -> None:
    x = [1e6, 2e6, 4e6, 8e6]
    crossing = gap_trend(x, [[3 * falls - falls * i + off for i, off in enumerate(gap)] for gap in gaps]).crossing
    if crossing is not None:
        assert crossing.low is not None and crossing.high is not None
        assert x[-1] <= crossing.low <= crossing.mean <= crossing.high


def test_an_interval_that_begins_before_the_last_point_is_cut_there() -> None:
    crossing = gap_trend([1, 2, 4], [[-0.3, -0.2, -0.1], [-0.31, -0.2, -0.12]]).crossing
    assert crossing is not None and crossing.low == 4 < crossing.mean


@pytest.mark.parametrize("rates", [(0.1, 0.1), (-0.01, 0.02), (-0.1, -0.2), (-0.1,)])
def test_a_gap_that_does_not_surely_close_has_no_crossing(rates: tuple[float, ...]) -> None:
    x = [1e6, 2e6, 4e6]
    assert gap_trend(x, [[0.9 + rate * math.log2(v / 1e6) for v in x] for rate in rates]).crossing is None
    with pytest.raises(NotDecidable, match="3 or more points, there are 2"):
        gap_trend(x[:2], [[0.1, 0.2]])
