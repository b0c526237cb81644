"""How many examples hypothesis draws: the same few in every run, unless `YOCO_U_FUZZ` asks for others or for more."""

import os

FUZZ = os.environ.get("YOCO_U_FUZZ")
"""A number, for others; or `all`, for ten times as many."""


def examples(few: int) -> int:
    """So many, or ten times as many."""
    return few * 10 if FUZZ == "all" else few
