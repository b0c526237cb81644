"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from yoco_u.training.metrics import Record


class Reporter(Protocol):
    """Shows the records of a run and messages between them."""

    def show(self, record: Record) -> None: ...

    def say(self, message: str) -> None: ...


@contextmanager
def progress_report(name: str, step: int, steps: int, enabled: bool) -> Iterator[Reporter]:
    """A reporter for a run of `steps` steps that begins or continues at `step`; it is silent unless enabled."""
    console = Console(stderr=True, quiet=not enabled, markup=False)  # names and paths may have brackets
    if not enabled or not console.is_terminal:
        yield _Lines(steps, lambda message: console.print(message, highlight=False, soft_wrap=True))
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, completed=step, figures="")

        def advance(record: Record) -> None:
            progress.update(task, completed=record["step"], figures=_figures(record))

        yield _Bar(advance, lambda message: console.print(message, highlight=False))


class _Lines:
    """A line for each evaluation, and for about fifty steps of the run."""

    def __init__(self, steps: int, say: Callable[[str], None]) -> None:
        self._steps, self._every, self.say = steps, max(1, steps // 50), say

    def show(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.say(_evaluation(record))
        elif record["step"] % self._every == 0 or record["step"] == self._steps:
            self.say(f"step {record['step']}/{self._steps}  {_figures(record)}")


class _Bar:
    def __init__(self, advance: Callable[[Record], None], say: Callable[[str], None]) -> None:
        self._advance, self.say = advance, say

    def show(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self.say(_evaluation(record))
        else:
            self._advance(record)


def _figures(record: Record) -> str:
    return f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}"


def _evaluation(record: Record) -> str:
    figures = f"perplexity {record['perplexity']:.2f}  {record['bits_per_byte']:.3f} bits per byte"
    return f"step {record['step']}  validation loss {record['loss']:.4f}  {figures}"
