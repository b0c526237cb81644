"""Statistics over a few seeds: intervals, paired differences, tokens to an equal loss, power laws, and the trend of a gap."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.optimize import curve_fit
from scipy.stats import binomtest, studentized_range, ttest_1samp
from scipy.stats import t as student_t

CONFIDENCE = 0.95
_SLOWEST, _FASTEST = 1e-4, 10.0  # exponents between which a power law is looked for
_DOUBLINGS = 40  # a crossing is told up to this many doublings of x beyond the last one


class NotDecidable(Exception):  # noqa: N818
    """The runs do not suffice for a conclusion; the message says why."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with its 95% confidence interval by Student's t.

    Attributes:
        low, high: bounds of the interval; None where there is no spread to tell them from: with one seed, or where all agree.
        count: number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def __neg__(self) -> "Interval":
        low, high = (None if bound is None else -bound for bound in (self.high, self.low))
        return Interval(-self.mean, low, high, self.count)

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The interval on another scale: mean and bounds through an increasing function."""
        bounds = [None if bound is None else function(bound) for bound in (self.low, self.high)]
        return Interval(function(self.mean), bounds[0], bounds[1], self.count)

    def among(self, parts: int) -> "Interval":
        """The interval so much wider that, with 95%, as many of its kind hold at once (Bonferroni).

        It decides whether any one of several holds, for which Holm's rule asks the same.
        """
        if self.low is None or self.high is None or parts == 1:
            return self
        alpha, freedom = 1 - CONFIDENCE, self.count - 1
        wider = float(student_t.ppf(1 - alpha / parts / 2, freedom) / student_t.ppf(1 - alpha / 2, freedom))
        low, high = (self.mean + wider * (bound - self.mean) for bound in (self.low, self.high))
        return Interval(self.mean, low, high, self.count)


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, one for each seed, with its interval.

    Raises:
        NotDecidable: if there is no value, or one is not finite.
    """
    count = len(values)
    if count == 0:
        raise NotDecidable("no seed has a value")
    if not all(map(math.isfinite, values)):
        raise NotDecidable("what is compared has no finite value for a seed")
    mean = math.fsum(values) / count
    if count == 1 or math.isclose(min(values), max(values), rel_tol=1e-12):  # no spread, or rounding alone
        return Interval(mean, None, None, count)
    low, high = ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Interval(mean, float(low), float(high), count)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Interval:
    """The mean of `values` minus `others`, paired by seed, with its interval.

    Runs of one seed read the same data in the same order, so a pair has in common what the seed does to both.

    Args:
        values, others: losses, say, by seed; seeds that only one of the two has are left out.

    Raises:
        NotDecidable: if they have no seed in common.
    """
    common = sorted(values.keys() & others.keys())
    if not common:
        raise NotDecidable("the two have no seed in common")
    return interval([values[seed] - others[seed] for seed in common])


@dataclass(frozen=True)
class Share:
    """How many of the questions that a seed was asked have the counted answer."""

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked


def share_interval(shares: Sequence[Share]) -> Interval:
    """The mean share over seeds. Its interval is Student's over the seeds, and at least Wilson's of all questions together.

    Wilson's alone would take a seed's questions as independent of it, Student's alone has no width where all seeds agree.

    Raises:
        NotDecidable: if there is no seed.
    """
    found = interval([share.value for share in shares])
    low, high = _wilson(shares)
    low, high = (low, high) if found.low is None or found.high is None else (min(low, found.low), max(high, found.high))
    return Interval(found.mean, max(0.0, low), min(1.0, high), found.count) if found.count > 1 else found


def share_difference(shares: Mapping[int, Share], others: Mapping[int, Share]) -> Interval:
    """The mean of `shares` minus `others`, paired by seed, with an interval of the same kind (Newcombe's, of two of Wilson's).

    Raises:
        NotDecidable: if they have no seed in common.
    """
    found = difference(*({seed: share.value for seed, share in of.items()} for of in (shares, others)))
    if found.count == 1:
        return found
    common = sorted(shares.keys() & others.keys())
    ours, theirs = ([of[seed] for seed in common] for of in (shares, others))
    (low, high), (other_low, other_high) = _wilson(ours), _wilson(theirs)
    rate, other = _pooled(ours).value, _pooled(theirs).value
    below, above = math.hypot(rate - low, other_high - other), math.hypot(high - rate, other - other_low)
    bounds = [rate - other - below, rate - other + above, *(bound for bound in (found.low, found.high) if bound is not None)]
    return Interval(found.mean, max(-1.0, min(bounds)), min(1.0, max(bounds)), found.count)


def _pooled(shares: Sequence[Share]) -> Share:
    return Share(sum(share.right for share in shares), sum(share.asked for share in shares))


def _wilson(shares: Sequence[Share]) -> tuple[float, float]:
    pooled = _pooled(shares)
    low, high = binomtest(pooled.right, pooled.asked).proportion_ci(CONFIDENCE, "wilson")
    return float(low), float(high)


def correlation_z(correlations: Sequence[float]) -> Interval:
    """The mean of correlations, one for each seed, with its interval, as Fisher's z: tanh makes correlations of it.

    Raises:
        NotDecidable: if there is no seed.
    """
    bound = 1 - 1e-9  # a correlation of 1 has no z
    return interval(np.arctanh(np.clip(correlations, -bound, bound)).tolist())


def simultaneous_half_width(losses: Sequence[Mapping[int, float]]) -> float:
    """Half the width of simultaneous 95% intervals for the differences of all pairs of models (Tukey's range test).

    With 19 grids out of 20 all the intervals hold at once. The design is one of randomized blocks, loss = model + seed + noise:
    what a seed does to all models alike is taken out, and the noise is estimated from all models together.

    Args:
        losses: losses by seed, of each model.

    Raises:
        NotDecidable: if the models have fewer than two seeds in common.
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in losses)))
    if len(seeds) < 2:
        raise NotDecidable("a comparison of several models needs two seeds that all of them have finished")
    table = np.array([[by_seed[seed] for seed in seeds] for by_seed in losses])  # (models, seeds)
    noise = table - table.mean(0, keepdims=True) - table.mean(1, keepdims=True) + table.mean()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    variance = float(np.square(noise).sum()) / freedom
    if math.sqrt(variance) <= 1e-12 * float(np.abs(table).max()):  # no spread, or rounding alone
        raise NotDecidable("the seeds differ by the same for all models, which tells nothing of the noise")
    return _studentized_range(len(losses), freedom) * math.sqrt(variance / len(seeds))


@lru_cache
def _studentized_range(models: int, freedom: int) -> float:
    return float(studentized_range.ppf(CONFIDENCE, models, freedom))


def first_reach(x: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The x at which a curve first comes down to `target`; None if it does not.

    The curve is taken as straight between its points, over log x. If it begins at or below the target, that is its first x.
    """
    for i, (here, loss) in enumerate(zip(x, losses, strict=True)):
        if loss <= target:
            if i == 0 or losses[i - 1] == loss:
                return here
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return math.exp(math.log(x[i - 1]) + share * (math.log(here) - math.log(x[i - 1])))
    return None


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + scale * x ** -exponent, fitted by least squares.

    Attributes:
        residual: root mean square of the differences between points and curve, in nats.
    """

    floor: float
    scale: float
    exponent: float
    residual: float

    def __call__(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent


def fit_power_law(x: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit L = E + A x^-a to the final losses of one seed over tokens or FLOPs.

    The fit has no interval of its own: what its points miss by is misfit as much as noise. `PowerLaws` has one, over seeds.

    Raises:
        NotDecidable: with fewer than four different x, as three parameters pass through three points whatever they are; or if
            the points do not bend enough to tell the floor from the slope.
    """
    different = len(set(x))
    if different < 4:
        raise NotDecidable(f"a power law with a floor needs runs at 4 or more budgets, there are {different}")
    xs, ys = np.asarray(x, dtype=float), np.asarray(losses, dtype=float)
    middle = float(np.exp(np.log(xs).mean()))

    def law(u: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return floor + scale * u**-exponent

    best: tuple[float, np.ndarray] | None = None
    spread = max(float(np.ptp(ys)), 1e-9)
    for exponent in (0.1, 0.3, 1.0):
        start = (max(0.0, float(ys.min()) - spread), spread, exponent)
        try:
            found, _ = curve_fit(law, xs / middle, ys, p0=start, bounds=([0, 0, _SLOWEST], [np.inf, np.inf, _FASTEST]))
        except RuntimeError:  # no convergence from here
            continue
        error = float(np.square(law(xs / middle, *found) - ys).sum())
        if best is None or error < best[0]:
            best = (error, found)
    if best is None:
        raise NotDecidable("no power law fits the points")
    error, (floor, scale, exponent) = best
    residual = math.sqrt(error / len(xs))
    if floor <= 1e-9 or residual > 0.1 * spread or not 1.01 * _SLOWEST < exponent < 0.99 * _FASTEST:
        raise NotDecidable(
            f"over these {different} budgets the loss does not bend enough to tell a power law's floor and exponent"
        )
    return PowerLaw(float(floor), float(scale * middle**exponent), float(exponent), residual)


@dataclass(frozen=True)
class PowerLaws:
    """The power laws of a model, one for each seed, which are independent as the points of one seed are not.

    Attributes:
        floor, exponent: their means over the seeds, with intervals.
        by_seed: the power law of each seed.
        budgets: the least number of budgets that a seed has.
    """

    floor: Interval
    exponent: Interval
    by_seed: dict[int, PowerLaw]
    budgets: int

    def __call__(self, x: float) -> float:
        """The mean of the laws at x."""
        return math.fsum(law(x) for law in self.by_seed.values()) / len(self.by_seed)


def fit_power_laws(points: Mapping[int, Sequence[tuple[float, float]]]) -> PowerLaws:
    """Fit a power law to each seed's points. Seeds with fewer than four budgets are left out, if another has as many.

    Args:
        points: pairs of x and final loss, by seed.

    Raises:
        NotDecidable: if no seed has four budgets, or the points of one do not bend enough.
    """
    budgets = {seed: len({x for x, _ in own}) for seed, own in points.items()}
    most = [seed for seed, count in budgets.items() if count >= 4] or sorted(budgets, key=lambda seed: -budgets[seed])[:1]
    by_seed = {seed: fit_power_law(*zip(*points[seed], strict=True)) for seed in most}
    floor, exponent = (interval([getattr(law, name) for law in by_seed.values()]) for name in ("floor", "exponent"))
    if exponent.low is not None and exponent.low <= 0:
        raise NotDecidable("the seeds' power laws differ too much to tell that the loss falls by one")
    return PowerLaws(floor, exponent, by_seed, min(budgets[seed] for seed in most))


@dataclass(frozen=True)
class Trend:
    """How a gap between two models changes with x, by a straight line over log x for each seed.

    Attributes:
        per_doubling: change of the gap when x doubles, in nats.
        crossing: x beyond the last one at which the line reaches zero, with the part of its interval that lies there. None
            unless the gap of every seed comes nearer to zero, and the interval of the change excludes zero.
    """

    per_doubling: Interval
    crossing: Interval | None


def gap_trend(x: Sequence[float], gaps: Sequence[Sequence[float]]) -> Trend:
    """The trend of a gap over x.

    Args:
        gaps: for each seed, the gap at each x.

    Raises:
        NotDecidable: with fewer than three x.
    """
    if len(x) < 3:
        raise NotDecidable(f"a trend needs the gap at 3 or more points, there are {len(x)}")
    logs = np.log2(np.asarray(x, dtype=float))
    lines = [np.polyfit(logs, np.asarray(gap, dtype=float), 1) for gap in gaps]
    ends = [float(np.polyval(line, logs[-1])) for line in lines]
    slope = interval([float(line[0]) for line in lines])
    closing = all(end * line[0] < 0 for end, line in zip(ends, lines, strict=True))
    if not closing or slope.low is None or slope.high is None or slope.low <= 0 <= slope.high:
        return Trend(slope, None)
    doublings = interval([float(-line[1] / line[0] - logs[-1]) for line in lines])
    return Trend(slope, doublings.map(lambda beyond: float(x[-1] * 2 ** np.clip(beyond, 0, _DOUBLINGS))))
