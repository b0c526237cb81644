"""Types of the numbers in settings, within which computing with them cannot overflow."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PlainValidator, PositiveFloat, PositiveInt

from yoco_u.config.base import shown

Count = Annotated[PositiveInt, Field(lt=2**31)]
"""A size, such as a width or a number of rows."""


def _loops_or_auto(value: object) -> object:
    if value == "auto":
        return value
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or not 1 <= whole < 2**31:
        raise ValueError(f"expected a whole number of at least 1, or auto, got {shown(value)}")
    return whole


LoopsOrAuto = Annotated[int | Literal["auto"], PlainValidator(_loops_or_auto, json_schema_input_type=Count | Literal["auto"])]
"""A loop count T, or auto: tokens leave the loop by themselves."""


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

NonNegativeFloat32 = Annotated[NonNegativeFloat, Field(le=3.4e38)]

PositiveFloat32 = Annotated[PositiveFloat, Field(le=3.4e38)]

Seconds = Annotated[PositiveFloat, Field(le=1e9)]
"""A time that somebody may wait for; 1e9 seconds are 31 years, and clocks overflow later."""
