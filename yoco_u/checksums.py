"""Checksums of the files in a folder, in a file that the command `sha256sum --check SHA256SUMS` reads as well."""

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from yoco_u.files import DamagedFile, is_mark, write_text

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write `SHA256SUMS` into a folder that is complete otherwise.

    Args:
        files: those whose contents must never change, by default all in the folder and below.
    """
    every = folder.rglob("*") if files is None else files
    chosen = sorted(path for path in every if path.is_file() and path != folder / SUMS and not is_mark(path))
    lines = (
        f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in zip(chosen, _digests(chosen), strict=True)
    )
    write_text(folder / SUMS, "".join(lines))


def verify_checksums(folder: Path, mend: str, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Compare the files of a folder with its `SHA256SUMS`, at about the rate at which they can be read.

    Args:
        mend: what the user can do about a damaged file, which ends the message.
        wanted: which files to read, by their names within the folder; all by default.

    Returns:
        Whether the folder has checksums. Folders of earlier versions have none, and are taken as they are.

    Raises:
        DamagedFile: if a file is missing or differs, with its name, or if the disk cannot give it.
        OSError: if it cannot be opened for another reason, which says nothing of what is in it, such as too many open files.
    """
    sums = folder / SUMS
    try:
        lines = sums.read_bytes().decode("utf-8").splitlines()
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise DamagedFile(f"{sums}: the file is damaged ({error}); {mend}") from None
    except OSError as error:
        raise _unreadable(sums, error) from None
    expected: dict[Path, str] = {}
    for number, line in enumerate(lines, start=1):
        parsed = _LINE.fullmatch(line)
        if parsed is None:
            raise DamagedFile(f"{sums}: the file is damaged, line {number} is no checksum; {mend}")
        if wanted(parsed[2]):
            expected[folder / parsed[2]] = parsed[1]
    if not lines:
        raise DamagedFile(f"{sums}: the file is damaged, it is empty; {mend}")
    for path in expected:
        if not path.is_file():
            raise DamagedFile(f"{path}: the file is missing; {mend}")
    for (path, digest), found in zip(expected.items(), _digests(expected), strict=True):
        if digest != found:
            raise DamagedFile(f"{path}: the file is damaged, its checksum is not the one in {SUMS}; {mend}")
    return True


def _digests(paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> OSError | DamagedFile:
    if error.errno == errno.EIO:
        return DamagedFile(f"{path}: cannot read it ({error.strerror or error}); the disk may be damaged")
    return OSError(error.errno, error.strerror, str(path))
