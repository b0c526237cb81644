"""Files and folders that appear whole or not at all, also where power fails."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from yoco_u.errors import UserError

PARTIAL = ".partial"
"""Suffix of what is not complete; nothing ever reads it, and it may be removed."""


def beside(path: Path) -> Path:
    """Where to write what `publish` then renames to `path`."""
    return path.with_name(path.name + PARTIAL)


def fresh_folder(path: Path) -> Path:
    """An empty folder beside `path`."""
    folder = beside(path)
    discard(folder)
    folder.mkdir(parents=True)
    return folder


def publish(path: Path) -> None:
    """Make what lies beside `path` appear as `path`: contents to the disk first, then the rename. An old folder makes room."""
    new = beside(path)
    for file in [new, *new.rglob("*")]:
        _sync(file)
    if path.is_dir():
        discard(path)
    new.replace(path)
    _sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder, if there is one, without ever leaving half of it under its name."""
    if folder.is_dir() and folder.suffix != PARTIAL:
        old = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        folder = folder.replace(old)
    shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    beside(path).write_text(text, encoding="utf-8")
    publish(path)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """What a JSON file holds, `default` if there is none.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as JSON ({error}); the file is damaged") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
