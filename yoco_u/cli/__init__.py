"""The command line `yoco-u`.

Arguments go in; results go to stdout, progress and the one line of an error to stderr, and `main` returns the exit status.
Every command has a file of its own name, which holds its options, its help and how its results are printed; the work is done
by the other rooms. Commands import those rooms when they run, so that `yoco-u --help` does not wait for torch.
Start with `main`, then read any command.
"""

import os
import select
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import typer
from pydantic import ValidationError

from yoco_u.cli.analyze import analyze
from yoco_u.cli.arguments import check_texts, with_checked_numbers
from yoco_u.cli.bench import bench
from yoco_u.cli.chat import chat
from yoco_u.cli.context import context
from yoco_u.cli.convert import convert
from yoco_u.cli.evaluate import evaluate
from yoco_u.cli.exits import exits
from yoco_u.cli.experiment import experiment
from yoco_u.cli.generate import generate
from yoco_u.cli.grpo import grpo
from yoco_u.cli.needles import needles
from yoco_u.cli.output import Stopped, print_any_text
from yoco_u.cli.plan import plan
from yoco_u.cli.prepare import prepare
from yoco_u.cli.quickstart import quickstart
from yoco_u.cli.report import report
from yoco_u.cli.serve import serve
from yoco_u.cli.sft import sft
from yoco_u.cli.tasks import tasks
from yoco_u.cli.train import train
from yoco_u.config import shown
from yoco_u.errors import UserError, describe_system_error, system_error

app = typer.Typer(
    name="yoco-u",
    help="Train, evaluate and run Universal YOCO language models.",
    epilog="Begin with [bold]yoco-u quickstart[/bold]; every command has its own --help.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    quickstart,
    plan,
    prepare,
    convert,
    train,
    sft,
    grpo,
    evaluate,
    tasks,
    context,
    needles,
    generate,
    chat,
    serve,
    report,
    analyze,
    exits,
    experiment,
    bench,
):
    app.command(no_args_is_help=command not in (quickstart, plan, bench))(with_checked_numbers(command))

_INTERRUPTED = 130
_CLOSED = 141  # what a shell reports of a program that SIGPIPE ended

# Some releases of typer bring a click of their own. Through these base classes we get the exceptions of the click in use.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 2 for a mistake of the user or a full disk (one line `error: ...` on stderr), 130 when interrupted,
        141 when nobody reads the output any more. Any other exception is a mistake of ours, and keeps its traceback.
    """
    print_any_text()
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        if _drop_output() and isinstance(found, BrokenPipeError):
            return _CLOSED
        return _fail(describe_system_error(found))
    except SystemExit as ended:  # rich's, where nobody reads what it prints
        if isinstance(ended.__context__, BrokenPipeError):
            return _CLOSED
        raise
    return status


def _run(given: list[str]) -> int:
    try:
        check_texts(given)
        _check_moved(given)
        command = _command()
        # Not by calling it: that would take an EOFError for Ctrl-C, and hide that an output is closed.
        with _quiet_threads(), command.make_context("yoco-u", given) as context:
            command.invoke(context)
    except UserError as error:
        return _fail(str(error))
    except typer.Exit as ended:
        return ended.exit_code
    except Stopped as stopped:
        return _interrupted(str(stopped))
    except KeyboardInterrupt:
        return _interrupted()
    except _ClickException as error:
        return _fail(_usage(error)) if str(error) else 2
    return 0


@cache
def _command() -> Any:
    return typer.main.get_command(app)


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep threads from printing errors of the operating system, which the main thread meets as well."""
    before = threading.excepthook

    def show(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is None or system_error(failure.exc_value) is None:
            before(failure)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = before


def _drop_output() -> bool:
    """Throw away what standard output does not take, as Python would fail on it once more at its end.

    Returns:
        Whether there was any: the disk behind it is full, or nobody reads it any more, as behind `| head`.
    """
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        dropped = _nobody_reads()  # what could not be written is not always kept
    except OSError:
        dropped = True
    if dropped:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return dropped


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader is gone. Windows cannot tell."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def _check_moved(arguments: Sequence[str]) -> None:
    """Name the command that took over `evaluate --tasks`."""
    if arguments[:1] == ["evaluate"] and any(argument.partition("=")[0] == "--tasks" for argument in arguments):
        raise UserError("evaluate has no --tasks any more; run yoco-u tasks RUN_OR_MODEL TASKS... instead")


def _interrupted(message: str = "interrupted") -> int:
    print(f"\n{message}", file=sys.stderr)
    return _INTERRUPTED


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _usage(error: BaseException) -> str:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if isinstance(error.__cause__, ValidationError):  # of the pydantic that some releases of typer read values with
        message = f"{message.rstrip('.')}, got {shown(error.__cause__.errors()[0]['input'])}"
    if isinstance(error, _UsageError) and context is not None:
        return f"{message.rstrip('.')}; see {context.command_path} --help"
    return message
