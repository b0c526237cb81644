"""Processes that send themselves a signal at one of their own writes: a moment that no busy machine can miss."""

import os
import sys
from fnmatch import fnmatchcase
from typing import Any


def signal_at(moment: str, number: int) -> None:
    """Send this process a signal just before it opens a file for writing, or makes, renames or removes one.

    Args:
        moment: what to wait for, as a pattern of `EVENT PATH` or `os.rename PATH NEW_PATH` (asterisks match slashes too),
            such as `open */summary.json.partial` or `os.rmdir */checkpoints/*`. Events are those of Python's audit hooks.
        number: the signal, sent the first time.
    """
    sent = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal sent
        if sent or not _writes(event, arguments):
            return
        paths = arguments[: 2 if event == "os.rename" else 1]
        if fnmatchcase(" ".join([event, *map(str, paths)]), moment):
            sent = True
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
