"""What commands print: results on stdout, notes and progress for people on stderr."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from yoco_u.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Print a value as JSON.

    Args:
        default: what to write for objects that JSON does not have.

    Raises:
        UserError: for NaN and infinity, which JSON does not have.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=default)
    except ValueError as error:
        raise UserError(f"the results hold a number that is not finite, which JSON does not have ({error})") from None
    print(text)


def print_any_text() -> None:
    """Let stdout and stderr print characters that their encoding does not have, as Python writes them in a literal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_first_process() -> bool:
    """Whether this process is the one that prints; under torchrun the other processes of a run are silent."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """Print a line on stderr, which leaves stdout to results."""
    if is_first_process():
        print(message, file=sys.stderr)


def table_of(*headings: str, text: int = 1, **style: Any) -> "Table":
    """An empty table with these columns.

    Args:
        text: how many of the columns, the first ones, hold text; the others hold numbers, and are aligned to the right.
        style: further arguments of rich's `Table`.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, **style)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < text else "right")
    return table


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs, if stderr is a terminal.

    Args:
        total: steps of the whole bar.

    Yields:
        A function that advances the bar by a number of steps.
    """
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
    """The command was asked to stop and did so in good order. The message says how to go on; the exit status is 130."""


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """Raise `Stopped` if training in the block was asked to stop and has left a checkpoint."""
    from yoco_u.training import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interrupted:
        raise Stopped(str(interrupted)) from None
