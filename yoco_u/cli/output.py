"""What commands print for machines and for people."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def is_first_process() -> bool:
    """Whether this is the process of a run that prints; the others under torchrun are silent."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """A line on stderr, which leaves stdout to results."""
    if is_first_process():
        print(message, file=sys.stderr)


def check_outputs(errors: Iterable[str | None]) -> None:
    """Say it if an output failed.

    Raises:
        UserError: with the first of the errors.
    """
    from yoco_u.inference.outputs import failed_output

    for error in errors:
        if error is not None:
            raise failed_output(error)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block runs, if that is a terminal; the block is given what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, advance=done)


class Stopped(Exception):  # noqa: N818
    """The command was asked to stop, and did so in good order; the message says how to go on."""


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """A run that was asked to stop and left a checkpoint ends the command with that line and status 130."""
    from yoco_u.training import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interrupted:
        raise Stopped(str(interrupted)) from None
