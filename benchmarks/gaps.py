"""Gaps in the streams of clients, and how much of each is the server's and not the clients' own.

Clients that share the cores with the server are kept from running too, by other programs and by their own work. While the event
loop of all clients stands still, no token can arrive, whatever the server does: that part of a gap says nothing of the server.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Gap(NamedTuple):
    """The time between two tokens of a stream, in seconds of one clock, and the hostile requests at its end."""

    begin: float
    end: float
    hostile: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass
class Gaps:
    """All gaps, and the times in which the clients stood still.

    Attributes:
        pauses: begin and end of each, in order; no two overlap.
    """

    found: list[Gap] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)

    def of_server(self, gap: Gap) -> float:
        """The part of a gap in which the clients ran, and so would have taken a token."""
        own = 0.0
        for number in range(bisect_right(self.pauses, gap.begin, key=lambda pause: pause[1]), len(self.pauses)):
            begin, end = self.pauses[number]
            if begin >= gap.end:
                break
            own += min(end, gap.end) - max(begin, gap.begin)
        return gap.seconds - own

    def longest(self, since: float) -> tuple[float, float, float]:
        """Of what ended after a time: the longest gap, the most of a gap that is the server's, and the longest pause."""
        new = [gap for gap in self.found if gap.end > since]
        pauses = (end - begin for begin, end in self.pauses if end > since)
        times = (gap.seconds for gap in new), map(self.of_server, new), pauses
        gap, of_server, pause = (max(some, default=0.0) for some in times)
        return gap, of_server, pause

    def percentiles(self) -> dict[str, int | None]:
        """Milliseconds under which 50, 99 and 99.9% of the gaps are, and of the server's parts; None if there are no gaps."""
        times = {"gaps under": [gap.seconds for gap in self.found], "the server": list(map(self.of_server, self.found))}
        return {
            f"{percent:g}% of {what}, ms": None if (most := under(some, percent)) is None else round(1e3 * most)
            for percent in (50, 99, 99.9)
            for what, some in times.items()
        }


def under(seconds: Sequence[float], percent: float) -> float | None:
    """The time under which so many percent of some times are, counted from the longest; None if there are no times."""
    return sorted(seconds, reverse=True)[round(len(seconds) * (1 - percent / 100))] if seconds else None
