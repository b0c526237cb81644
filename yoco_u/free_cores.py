"""How many threads a step on a CPU gets: as many as there are cores that other programs leave.

A kernel ends when its last thread does. A thread that takes turns with another program on a core holds up all others at every
kernel of a step, so that one thread fewer is faster than one that waits for its core. The results of the engine's kernels do
not depend on the number of threads. Those of training do, in the last bits.
"""

import os
import time
from collections.abc import Callable

import psutil
import torch


class FreeCores:
    """Follows what other programs leave, between two steps and on the thread that runs them.

    The number of threads stays as it is if the environment variable OMP_NUM_THREADS is set.

    Args:
        seconds: between two looks; the system counts in steps of 10 ms.
        stale: seconds after which what was used tells too little of the present: look again first.
        halving: whether the number of threads is halved until there are as many cores, and takes no other values. Where each
            number of threads costs a compilation, there are few of them then.
        clock: seconds since some moment.
        used: seconds of CPU time since some moment: of all programs on the cores that this process may use, and of its own.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.25,
        stale: float = 2.0,
        halving: bool = False,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], tuple[float, float]] = lambda: (_used_by_all(), _used_by_this_process()),
    ) -> None:
        self._seconds, self._stale, self._clock, self._used = seconds, stale, clock, used
        self._fixed = "OMP_NUM_THREADS" in os.environ
        self._most, self._cores = torch.get_num_threads(), len(_cores())
        self._choices = [self._most >> n if halving else self._most - n for n in range(self._most)]
        self._looked, self._before = clock(), used()

    def follow(self) -> None:
        """Set the number of threads of the calling thread's work, if it is time to look again."""
        threads = self.threads()
        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def threads(self) -> int | None:
        """The number of threads for the cores that are free; None if it is not time to look again."""
        now = self._clock()
        elapsed = now - self._looked
        if self._fixed or elapsed < self._seconds:
            return None
        used = self._used()
        of_all, own = (after - before for after, before in zip(used, self._before, strict=True))
        self._looked, self._before = now, used
        if elapsed > self._stale:
            return None
        free = max(1, round(self._cores - max(0.0, of_all - own) / elapsed))
        return next(choice for choice in self._choices if choice <= free)


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _used_by_all() -> float:
    times = psutil.cpu_times(percpu=True)
    return sum(_busy(times[core]) for core in _cores() if core < len(times))


def _busy(times: object) -> float:
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


def _used_by_this_process() -> float:
    times = os.times()
    return times.user + times.system
