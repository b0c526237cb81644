"""Locks on files that name what one writer at a time may change: one thread of one process.

Unlike those of the package filelock, they make no file, and tell whether the file is still the one that has the name. A lock
ends with its process, however that ends.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file until `unlock`. Who has the lock already must not ask again: it would wait for itself.

    Args:
        wait: for the thread or process that has it.

    Returns:
        What `unlock` takes: a descriptor, or -1 where there are no locks (Windows, some network drives) or none may be taken.
        None if another one has the lock, or the file is gone or has moved meanwhile.
    """
    if sys.platform == "win32":
        return -1
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else -1
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        unlock(file)
        return -1
    except BaseException:  # Ctrl-C
        unlock(file)
        raise
    unlock(file)
    return None


def unlock(held: int | None) -> None:
    """Give a lock back, wherever its file is by now."""
    if sys.platform != "win32" and held is not None and held >= 0:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_UN)  # closing is not enough where a forked process has the descriptor too
        os.close(held)
