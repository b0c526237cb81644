"""Which of all possible cases are tested: the same few in every run, unless `YOCO_U_FUZZ` asks for others or for more."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

FUZZ = os.environ.get("YOCO_U_FUZZ")
"""A number, for others; or `all`."""


def examples(few: int) -> int:
    """How many hypothesis draws: so many, or ten times as many."""
    return few * 10 if FUZZ == "all" else few


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which each value of each axis comes up: as many as the longest axis has, or all there are."""
    if FUZZ == "all":
        return list(itertools.product(*axes))
    turn = int(FUZZ or 0)
    longest = max(map(len, axes))
    return [tuple(axis[(place + number * turn) % len(axis)] for number, axis in enumerate(axes)) for place in range(longest)]
