"""Training beside other programs, on a CPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from yoco_u.free_cores import FreeCores

_LOOKS = 10  # of a second or more each, in all of which other programs were busy


class OtherPrograms:
    """Gives other programs the cores that they use, or says once that this would be faster.

    Args:
        follow: whether the number of threads may change, on which the results depend in their last bits.
        say: shows a message to the user.
    """

    def __init__(self, follow: bool, say: Callable[[str], None]) -> None:
        self._cores = FreeCores(seconds=1.0, stale=math.inf, halving=True)
        self._follow, self._say, self._busy = follow, say, 0

    def mind(self) -> None:
        """Look, between two steps, if it is time to."""
        if self._follow:
            self._cores.follow()
            return
        threads = self._cores.threads()
        if threads is None or self._busy == _LOOKS:
            return
        self._busy = self._busy + 1 if threads < torch.get_num_threads() else 0
        if self._busy == _LOOKS:
            self._say("other programs keep cores busy; a new run with training.follow_free_cores=true is faster beside them")


@contextmanager
def minding_others(device: torch.device, follow: bool, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """What to call between two steps; the number of threads is what it was when the context is left."""
    if device.type != "cpu":
        yield lambda: None
        return
    threads = torch.get_num_threads()
    try:
        yield OtherPrograms(follow, say).mind
    finally:
        torch.set_num_threads(threads)
