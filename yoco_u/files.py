"""Files and folders that appear whole or not at all, even if the power fails: written beside their place, then renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from yoco_u.errors import UserError

PARTIAL = ".partial"
"""Suffix of files and folders that are not complete. Nothing ever reads them, and they may be removed."""


def beside(path: Path) -> Path:
    """Where to write a file or folder that `publish(path)` then renames to `path`."""
    return path.with_name(path.name + PARTIAL)


def fresh_folder(path: Path) -> Path:
    """Make an empty folder beside `path`, which `publish(path)` renames once it has been filled."""
    folder = beside(path)
    discard(folder)
    folder.mkdir(parents=True)
    return folder


def publish(path: Path) -> None:
    """Rename what was written beside `path` to `path`, after its contents have reached the disk.

    An old file is replaced in the same moment; an old folder, which cannot be, is removed first.
    """
    new = beside(path)
    for file in [new, *new.rglob("*")]:
        _sync(file)
    if path.is_dir():
        discard(path)
    new.replace(path)
    _sync(path.parent)


def discard(folder: Path) -> None:
    """Remove a folder if it exists. It is renamed first, so that no half of it is ever seen under its name."""
    if folder.is_dir() and folder.suffix != PARTIAL:
        old = folder.with_name(f"{folder.name}.old{PARTIAL}")
        shutil.rmtree(old, ignore_errors=True)
        folder = folder.replace(old)
    shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all."""
    beside(path).write_text(text, encoding="utf-8")
    publish(path)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, which appears whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """Read a JSON file; `default` if there is none.

    Raises:
        UserError: if it cannot be read, or is not JSON.
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
