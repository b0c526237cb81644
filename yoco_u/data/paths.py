"""The files behind an entry of a corpus: what a folder holds, and what a pattern matches. Links that lead back end here."""

import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, as those of hidden files and folders do."""
    return path.name.startswith(".")


def walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder and its subfolders, sorted by name within each.

    Hidden folders are not entered. A folder that several links reach is entered once, under the name that comes first, so that
    links which lead back to a folder above them end.

    Raises:
        OSError: if a folder cannot be read.
    """
    entered = {os.path.realpath(folder)}
    pending = [iter(sorted(folder.iterdir()))]
    while pending:
        path = next(pending[-1], None)
        if path is None:
            pending.pop()
            continue
        yield path
        if path.is_dir() and not is_hidden(path) and (place := os.path.realpath(path)) not in entered:
            entered.add(place)
            pending.append(iter(sorted(path.iterdir())))


def matches(pattern: Path) -> list[Path]:
    """Everything that a pattern matches, sorted.

    `*`, `?` and `[...]` match within a name, and a part `**` any folders. Only a part that begins with a dot matches a hidden
    name. A part that exists as it is written stands for itself.

    Raises:
        OSError: if a folder cannot be read.
    """
    found = [Path(pattern.anchor)]
    for part in pattern.relative_to(pattern.anchor).parts:
        found = list(dict.fromkeys(match for folder in found if folder.is_dir() for match in _in_folder(folder, part)))
    if pattern.name == "**":  # whose folders stand for what is in them
        found = [path for path in found if not path.is_dir()]
    return sorted(found, key=str)


def _in_folder(folder: Path, part: str) -> list[Path]:
    if os.path.lexists(folder / part):
        return [folder / part]
    if part == "**":
        return [folder, *(path for path in walk(folder) if not is_hidden(path))]
    if not any(wildcard in part for wildcard in "*?["):
        return []
    hidden = part.startswith(".")
    return [path for path in folder.iterdir() if fnmatch.fnmatch(path.name, part) and (hidden or not is_hidden(path))]
