"""A disk that fails, or a process that dies, at the k-th time that Python writes to a folder.

What libraries write in C++ or Rust is not seen.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = 9
"""The exit status of a process that dies so."""

_WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


@dataclass
class Disk:
    """A folder whose writes are counted.

    Attributes:
        folder: files outside are written as ever.
        fail_at: number of the write that fails, from 1 on; None: none fails.
        error: the number of the error.
        lasting: whether all later writes fail too, as on a full disk.
        kills: whether the process dies at that write instead, at once and without a word.
        writes: how many there were.
    """

    folder: Path
    fail_at: int | None = None
    error: int = 0
    lasting: bool = False
    kills: bool = False
    writes: int = 0

    def write(self, path: Any) -> None:
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(f"{self.folder}{os.sep}"):
            return
        self.writes += 1
        if self.fail_at is not None and (self.writes == self.fail_at or (self.lasting and self.writes > self.fail_at)):
            if self.kills:
                os._exit(KILLED)
            raise OSError(self.error, os.strerror(self.error), str(path))


_disk: Disk | None = None


@contextmanager
def failing_disk(
    folder: Path, fail_at: int | None = None, error: int = 0, lasting: bool = False, kills: bool = False
) -> Iterator[Disk]:
    global _disk
    if not _hooked:
        sys.addaudithook(_hook)  # it cannot be taken away again
        _hooked.append(True)
    _disk = Disk(folder, fail_at, error, lasting, kills)
    try:
        yield _disk
    finally:
        _disk = None


_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _disk is None:
        return
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if opened or event in _WRITING:
        _disk.write(arguments[0])
