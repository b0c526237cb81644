"""Types of the numbers in settings, within which computing with them cannot overflow."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PlainValidator, PositiveFloat, PositiveInt

from yoco_u.config.base import shown

Count = Annotated[PositiveInt, Field(lt=2**31)]
"""A size, such as a width or a number of rows."""


MOST_LOOPS = 256
"""The largest loop count T: every loop takes the time of a pass, and models are known to gain from some dozens at most."""


def too_many_loops(loops: int) -> str | None:
    """Why a model does not run so many loops; None if it does."""
    if loops <= MOST_LOOPS:
        return None
    return f"{shown(loops)} loops are too many, each takes the time of a pass; expected at most {MOST_LOOPS}"


def _few_loops(loops: int) -> int:
    if problem := too_many_loops(loops):
        raise ValueError(problem)
    return loops


Loops = Annotated[PositiveInt, AfterValidator(_few_loops)]
"""A loop count T."""


def _loops_or_auto(value: object) -> object:
    if value == "auto":
        return value
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
        raise ValueError(f"expected a whole number of at least 1, or auto, got {shown(value)}")
    return _few_loops(whole)


_LimitedLoops = Annotated[int, Field(ge=1, le=MOST_LOOPS)]
LoopsOrAuto = Annotated[
    int | Literal["auto"], PlainValidator(_loops_or_auto, json_schema_input_type=_LimitedLoops | Literal["auto"])
]
"""A loop count T, or auto: tokens leave the loop by themselves."""


def at_most(limit: int, why: str) -> AfterValidator:
    """Of a number that scales work or memory: an upper limit, with its reason for the error."""

    def check(value: int) -> int:
        if value > limit:
            raise ValueError(f"expected at most {limit:,} ({why}), got {shown(value)}")
        return value

    return AfterValidator(check)


def _each_once(values: tuple[object, ...]) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{', '.join(map(str, values))}: expected each value once")
    return values


EachOnce = AfterValidator(_each_once)
"""Of a list whose values are told apart by nothing else."""

Seed = Annotated[NonNegativeInt, Field(lt=2**63)]
"""Of a generator of random numbers; torch and numpy take no other."""

Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
"""A number that becomes one of a tensor's."""

SMALLEST = 2.0**-126
"""The smallest positive float32 of full precision; what is much smaller becomes 0, or is taken for it by fast kernels."""


def _not_lost(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"{value:g} is too small for a float32; expected at least {SMALLEST:.3g}")
    return value


NonNegativeFloat32 = Annotated[NonNegativeFloat, Field(le=3.4e38), AfterValidator(_not_lost)]

PositiveFloat32 = Annotated[PositiveFloat, Field(le=3.4e38), AfterValidator(_not_lost)]

Seconds = Annotated[PositiveFloat, Field(le=1e9)]
"""A time that somebody may wait for; 1e9 seconds are 31 years, and clocks overflow later."""
