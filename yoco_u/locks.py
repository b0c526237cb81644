"""Locks on files that name what one process at a time may change. A lock ends with its process, however that ends.

Unlike those of the package filelock, they make no file, and tell whether the file is still the one that has the name.
"""

import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_held = dict[tuple[int, int], int]()
"""Descriptors of the files that this process has locked, by device and number of the file."""


def lock(path: Path, wait: bool = False) -> int | None:
    """Lock a file. A process that has its lock gets it again.

    Args:
        wait: for the process that has it.

    Returns:
        What `unlock` takes: a descriptor, or -1 where there are no locks (Windows, some network drives) or none may be taken.
        None if another process has the lock, or the file is gone or has moved meanwhile.
    """
    if sys.platform == "win32":
        return -1
    try:
        file = os.open(path, os.O_RDWR)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else -1
    status = os.fstat(file)
    key = status.st_dev, status.st_ino
    if key in _held:
        os.close(file)
        return _held[key]
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(status, path.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except OSError:
        os.close(file)
        return -1
    except BaseException:  # Ctrl-C
        os.close(file)
        raise
    if not mine:
        os.close(file)
        return None
    _held[key] = file
    return file


def unlock(held: int | None) -> None:
    """Give a lock back, wherever its file is by now."""
    for key in [key for key, file in list(_held.items()) if file == held]:
        os.close(_held.pop(key))
