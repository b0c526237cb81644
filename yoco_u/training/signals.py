"""Signals that ask a run to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """The signal that asked the run to stop; None as long as none came."""

    signal: int | None = None


@contextmanager
def noting_signals(stop: Stop) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM, so that the run can stop between two steps; a second one acts at once."""
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        stop.signal = number
        for signum, handler in before.items():
            signal.signal(signum, handler)

    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
