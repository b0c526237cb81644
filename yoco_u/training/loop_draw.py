"""Loop counts drawn anew for each optimizer step, so that one model learns to run with any of them.

A draw depends on the run's seed and the number of the step alone, so all processes draw the same, and so does a run that
continues.
"""

import math
import random
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import Field, model_validator

from yoco_u.config import MOST_LOOPS, Config, Count, Loops, Needs


class LoopDraw(Config):
    """The distribution that the loop counts of each optimizer step are drawn from.

    Attributes:
        distribution: `uniform` draws every count from `least` to `most` alike. `poisson_lognormal` draws 1 plus a Poisson
            number whose rate is log-normal, as Huginn does (arXiv 2502.05171): mostly a few loops, seldom many.
        least: the smallest loop count; `poisson_lognormal` counts what it draws below as this.
        most: the largest loop count, at most 256; `poisson_lognormal` counts what it draws above as this.
        mean: mean of `poisson_lognormal` before what is outside `least` to `most` is counted as these. By default it is the
            loop count that the step would have without drawing: that of `loop_schedule`, or of the architecture.
        sigma: of `poisson_lognormal`, the standard deviation of the logarithm of the rate.
        per_step: how many loop counts a step draws, spread evenly over the distribution. Each is for an equal share of the
            step's rows, so it divides those of each process.
    """

    distribution: Literal["uniform", "poisson_lognormal"] = "uniform"
    least: Loops = 1
    most: Loops
    mean: Annotated[float | None, Field(ge=1, le=MOST_LOOPS), Needs("distribution", "poisson_lognormal")] = None
    sigma: Annotated[float, Field(ge=0, le=2), Needs("distribution", "poisson_lognormal")] = 0.5
    per_step: Count = 1

    @model_validator(mode="after")
    def _possible(self) -> "LoopDraw":
        if self.least > self.most:
            raise ValueError(f"least is {self.least}, above most, which is {self.most}; swap or change them")
        return self

    def probabilities(self, planned: int) -> dict[int, float]:
        """The probability of each loop count from `least` to `most`.

        Args:
            planned: loop count of the step without drawing, which is the mean where none is set.
        """
        return dict(zip(range(self.least, self.most + 1), _probabilities(self, self._mean(planned)), strict=True))

    def at(self, seed: int, step: int, planned: int) -> tuple[int, ...]:
        """The loop counts of training step `step` of the run with this seed, the smallest first.

        They are a systematic sample: one number is drawn, and as many quantiles as are needed lie at equal distances from it.
        """
        below, drawn = _cumulative(self, self._mean(planned)), uniform("loops", seed, step)
        quantiles = [(number + drawn) / self.per_step for number in range(self.per_step)]
        return tuple(self.least + bisect_right(below, quantile, hi=len(below) - 1) for quantile in quantiles)

    def _mean(self, planned: int) -> float:
        return planned if self.mean is None else self.mean


def uniform(*key: int | str) -> float:
    """A number from [0, 1) that depends on the key alone: the same in every process, on every machine."""
    return random.Random(" ".join(map(str, key))).random()


@lru_cache
def _cumulative(draw: LoopDraw, mean: float) -> tuple[float, ...]:
    return tuple(accumulate(_probabilities(draw, mean)))


@lru_cache
def _probabilities(draw: LoopDraw, mean: float) -> tuple[float, ...]:
    if draw.distribution == "uniform":
        count = draw.most - draw.least + 1
        return (1 / count,) * count
    if draw.least == draw.most:
        return (1.0,)
    exact = [_poisson_lognormal(count - 1, mean - 1, draw.sigma) for count in range(1, draw.most)]
    return (math.fsum(exact[: draw.least]), *exact[draw.least :], max(0.0, 1 - math.fsum(exact)))


_STEP, _RANGE = 0.02, 8.0


def _poisson_lognormal(count: int, mean: float, sigma: float) -> float:
    """Probability of `count` under a Poisson distribution whose rate is log-normal with this mean: by the trapezoidal rule."""
    if mean == 0:
        return float(count == 0)
    half, total = round(_RANGE / _STEP), []
    for z in (number * _STEP for number in range(-half, half + 1)):
        log_rate = math.log(mean) + sigma * z - sigma**2 / 2
        total.append(math.exp(count * log_rate - math.exp(log_rate) - math.lgamma(count + 1) - z**2 / 2))
    return math.fsum(total) * _STEP / math.sqrt(2 * math.pi)
