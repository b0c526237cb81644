"""Checksums of the files in a folder, in a file that the command `sha256sum --check SHA256SUMS` reads as well.

A folder may also hold files that users may change, such as a chat template, and users may add files to it. A second list, in
the mark `.yoco-u-written`, tells how we wrote the former, so that neither is lost when the folder is written anew.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from yoco_u.errors import UserError
from yoco_u.files import DamagedFile, write_text
from yoco_u.folders import is_mark
from yoco_u.regular_files import read_regular

SUMS = "SHA256SUMS"

_WRITTEN = ".yoco-u-written"
_COUNT = re.compile(r"# files: ([0-9]{1,9})")  # the first line, but for earlier versions; `sha256sum` skips comments
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write `SHA256SUMS` into a folder that is complete otherwise.

    Args:
        files: those whose contents must never change, by default all in the folder and below. Users may change the others.
    """
    every = [path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS and not is_mark(path)]
    chosen = set(every if files is None else files)
    _write_sums(folder, SUMS, [path for path in every if path in chosen])
    if free := [path for path in every if path not in chosen]:
        _write_sums(folder, _WRITTEN, free)


def verify_checksums(folder: Path, mend: str, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Compare the files of a folder with its `SHA256SUMS`, at about the rate at which they can be read.

    Args:
        mend: what the user can do about a damaged file, which ends the message.
        wanted: which files to read, by their names within the folder; all by default.

    Returns:
        Whether the folder has checksums. Folders of earlier versions have none, and are taken as they are.

    Raises:
        DamagedFile: if a file is missing or differs, with its name, or if the disk cannot give it.
        UserError: if `SHA256SUMS` is a pipe or a device.
        OSError: if it cannot be opened for another reason, which says nothing of what is in it, such as too many open files.
    """
    sums = folder / SUMS
    try:
        text = read_regular(sums)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(sums, error) from None
    expected = {folder / name: digest for name, digest in _parsed(sums, text, mend).items() if wanted(name)}
    for path in expected:
        if not path.is_file():
            raise DamagedFile(f"{path}: the file is missing, which {SUMS} names; {mend}")
    for (path, digest), found in zip(expected.items(), _digests(expected), strict=True):
        if digest != found:
            raise DamagedFile(f"{path}: the file is damaged, its checksum is not the one in {SUMS}; {mend}")
    return True


def checksums_digest(folder: Path, wanted: Callable[[str], bool]) -> str | None:
    """What tells files of a folder from others: a digest of their checksums; None if the folder has none.

    Args:
        wanted: which files, by their names within the folder.
    """
    sums = sorted(name + digest for name, digest in _read_sums(folder / SUMS).items() if wanted(name))
    return hashlib.sha256("\n".join(sums).encode()).hexdigest() if sums else None


def added_or_changed(folder: Path) -> list[Path]:
    """What users have added to a folder since `write_checksums`, and what they have changed in it: files and links.

    What `SHA256SUMS` names is none of it, since a change of that is damage; without `SHA256SUMS`, which users remove if they
    change such files on purpose, it is. Folders of earlier versions that have no checksums are taken as they are.
    """
    if not any((folder / name).is_file() for name in (SUMS, _WRITTEN)):
        return []
    fixed, written = {SUMS, *_read_sums(folder / SUMS)}, _read_sums(folder / _WRITTEN)

    def is_ours(path: Path) -> bool:
        name = path.relative_to(folder).as_posix()
        regular = path.is_file() and not path.is_symlink()
        return name in fixed or is_mark(path) or (regular and name in written and _digest(path) == written[name])

    return [path for path in sorted(folder.rglob("*")) if (path.is_symlink() or not path.is_dir()) and not is_ours(path)]


def check_changes(folder: Path, kept: bool = False) -> None:
    """Check, before anything is computed, that no change of a user is lost if a folder is replaced.

    Args:
        kept: whether `keep_changes` takes them into the new one.

    Raises:
        UserError: if one would be; it names the file.
    """
    changes = added_or_changed(folder)
    if kept and changes and not (folder / SUMS).exists():
        raise UserError(f"{folder}: {SUMS} was removed, so what is there was changed on purpose; move it elsewhere")
    for path in changes:
        if not kept:
            raise UserError(f"{path}: was added or changed since yoco-u wrote the folder; name another, or move it elsewhere")
        if not path.is_file() and not path.is_symlink():
            raise UserError(f"{path}: is no regular file; move it elsewhere")


def keep_changes(old: Path, new: Path) -> None:
    """Copy what users have added to or changed in a folder into that which takes its place, and has checksums.

    Raises:
        UserError: if something is to stay that cannot, see `check_changes`.
    """
    check_changes(old, kept=True)
    fixed = _read_sums(new / SUMS)
    for path in added_or_changed(old):
        name = path.relative_to(old)
        if name.as_posix() not in fixed:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).unlink(missing_ok=True)
            shutil.copy2(path, new / name, follow_symlinks=False)


def _parsed(sums: Path, text: bytes, mend: str) -> dict[str, str]:
    """The checksums in a file, all of those that were written, by name."""
    try:
        *lines, end = text.decode("utf-8").split("\n")
    except ValueError as error:
        raise DamagedFile(f"{sums}: the file is damaged ({error}); {mend}") from None
    if not lines or end:
        raise DamagedFile(f"{sums}: the file is damaged, it {'ends within a line' if end else 'is empty'}; {mend}")
    counted, found = _COUNT.fullmatch(lines[0]), {}
    for number, line in enumerate(lines, start=1):
        if (parsed := _LINE.fullmatch(line)) is not None:
            found[parsed[2]] = parsed[1]
        elif number > 1 or counted is None:
            raise DamagedFile(f"{sums}: the file is damaged, line {number} is no checksum; {mend}")
    if counted is not None and int(counted[1]) != len(found):
        raise DamagedFile(f"{sums}: the file is damaged, it has {len(found)} of {counted[1]} checksums; {mend}")
    return found


def _write_sums(folder: Path, name: str, files: list[Path]) -> None:
    chosen = sorted(files)
    lines = [
        f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in zip(chosen, _digests(chosen), strict=True)
    ]
    write_text(folder / name, "".join([f"# files: {len(lines)}\n", *lines]))


def _read_sums(file: Path) -> dict[str, str]:
    """The checksums in the lines that are whole, by name; none if there is no file."""
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    return {parsed[2]: parsed[1] for parsed in map(_LINE.fullmatch, text.splitlines()) if parsed is not None}


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
