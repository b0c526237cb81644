"""Paths in settings. Relative ones begin in the working folder of whoever wrote them, so a place has many spellings."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from yoco_u.config import Config, differences
from yoco_u.data.corpus import is_path

Places = Callable[[str], Sequence[str]]
"""Where a path in older settings may lead."""

_PATHS = frozenset({"dataset", "start_from", "teacher", "corpus", "validation_corpus", "tokenizer"})


def changes(old: Config, new: Config, places: Places) -> Iterator[tuple[str, Any, Any]]:
    """`differences` of two configs, without paths that lead to the same place.

    Args:
        places: where a path in `old` may lead; those in `new` begin in the working folder.
    """
    for key, before, now in differences(old, new):
        name = key.rstrip(".0123456789").rpartition(".")[2]
        if not (name in _PATHS and isinstance(before, str) and isinstance(now, str) and same_place(before, now, places)):
            yield key, before, now


def same_place(old: str, new: str, places: Places) -> bool:
    """Whether two paths lead to the same place; arguments as of `changes`."""
    if old == new:
        return True
    return is_path(old) and is_path(new) and absolute(new) in map(absolute, places(old))


def absolute(path: str, folder: str | Path = "") -> str:
    """The place that a path leads to from a folder, with links followed.

    Args:
        folder: by default the working folder, or / if that was removed.
    """
    joined = os.path.join(folder, os.path.expanduser(path))
    try:
        return os.path.realpath(joined)
    except FileNotFoundError:
        return os.path.realpath(os.path.join(os.sep, joined))


def seen_from(folder: str | Path) -> str:
    """The working folder, relative to a folder, so that both may be moved together."""
    here, there = absolute(os.curdir), absolute(str(folder))
    try:
        return os.path.relpath(here, there)
    except ValueError:  # on another drive of Windows
        return here
