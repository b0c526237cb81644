"""Turns: what takes long for one request is computed in threads, few at once, and the shortest first."""

import heapq
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_LONGEST_WAIT = 30.0  # seconds of computing that a task may have before itself


class Crowded(Exception):  # noqa: N818
    """Too much is to be computed before this.

    Attributes:
        seconds: after which another try may succeed.
    """

    def __init__(self, seconds: int, what: str) -> None:
        super().__init__(f"too many {what}; try again in {seconds} s, or with a simpler one")
        self.seconds = seconds


class Turns:
    """Runs tasks in threads: of those that wait, the one first that may take the least.

    So a task waits for as many seconds of others as a constant says, or is refused: those that may take longer come behind it.

    Args:
        name: of the threads.
        at_once: tasks that run at the same time.
        what: the tasks, for whom there are too many: "... are being compiled".
    """

    def __init__(self, name: str, at_once: int, what: str) -> None:
        self._what = what
        self._threads = ThreadPoolExecutor(at_once, name)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, Callable[[], bool], Callable[[], None]]] = []  # a heap

    def take(self, seconds: float, wanted: Callable[[], bool], task: Callable[[], None]) -> None:
        """Run a task when it is its turn.

        Args:
            seconds: that it may take, and has taken before.
            wanted: says whether anybody still waits for it, so that it will take that long.

        Raises:
            Crowded: if it would have to wait for too long.
        """
        with self._lock:
            ahead = sum(others for others, _, counts, _ in self._waiting if others <= seconds and counts())
            if ahead > _LONGEST_WAIT:
                raise Crowded(math.ceil(_LONGEST_WAIT), self._what)
            heapq.heappush(self._waiting, (seconds, next(self._numbers), wanted, task))
        self._threads.submit(self._run_next)

    def _run_next(self) -> None:
        with self._lock:
            _, _, _, task = heapq.heappop(self._waiting)
        task()
