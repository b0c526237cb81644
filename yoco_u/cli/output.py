"""What commands print for machines and for people."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_first_process() -> bool:
    """Whether this is the process of a run that prints; the others under torchrun are silent."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """A line on stderr, which leaves stdout to results."""
    if is_first_process():
        print(message, file=sys.stderr)


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """A run that was asked to stop and left a checkpoint ends the command with one line and status 130."""
    from yoco_u.training import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interrupted:
        note(str(interrupted))
        raise typer.Exit(130) from None
