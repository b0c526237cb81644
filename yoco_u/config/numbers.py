"""Types of the numbers in settings, within which computing with them cannot overflow."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Count = Annotated[PositiveInt, Field(lt=2**31)]
"""A size, such as a width or a number of rows."""

Seed = Annotated[NonNegativeInt, Field(lt=2**63)]
"""Of a generator of random numbers; torch and numpy take no other."""

Float32 = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]
"""A number that becomes one of a tensor's."""

NonNegativeFloat32 = Annotated[NonNegativeFloat, Field(le=3.4e38)]

PositiveFloat32 = Annotated[PositiveFloat, Field(le=3.4e38)]

Seconds = Annotated[PositiveFloat, Field(le=1e9)]
"""A time that somebody may wait for; 1e9 seconds are 31 years, and clocks overflow later."""
