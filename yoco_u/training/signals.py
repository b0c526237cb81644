"""Signals that ask a program to stop, noted so that it stops in good order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noting_signals(noted: list[int], *, once: bool) -> Iterator[None]:
    """Note SIGINT and SIGTERM, instead of ending anything. Those that this process ignores stay ignored.

    Signals reach the main thread alone, so another thread notes none.

    Args:
        noted: gets the number of each signal.
        once: note the first signal alone; a second one acts at once.
    """
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if once:
            restore()

    if threading.current_thread() is threading.main_thread():
        heeded = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) not in (signal.SIG_IGN, None)]
        before.update({number: signal.getsignal(number) for number in heeded})
        for number in heeded:
            signal.signal(number, note)
    try:
        yield
    finally:
        restore()
