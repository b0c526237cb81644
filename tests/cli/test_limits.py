"""Every number of every command with a value that nobody can wait for, or has the memory for.

The table is made from the commands themselves: a new number is refused, or it stands below with the reason why it need not be.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from test_fuzz import COMMANDS, Command, _short, place  # noqa: F401  (fixtures)
from typer.models import OptionInfo

from yoco_u.cli import app

HUGE = "2000000000"
ENDS = {
    "--max-tokens": "no output is longer than the engine's caches",
    "--top-k": "the vocabulary ends",
    "--temperature": "no work",
    "--repetition-penalty": "no work",
    "--exit-threshold": "no work",
    "--tolerance": "no work",
    "--seed": "no work",
    "--tokens": "the text ends",
    "--texts": "the text ends",
    "--limit": "the questions end",
    "--batch": "arithmetic alone",
    "--contexts": "cases without memory or time are left out",
    "--batches": "cases without memory or time are left out",
    "--time-limit": "the time itself, which is for the user to say",
    "--minutes": "the time itself, which is for the user to say",
    "--client-seconds": "the time itself, which is for the user to say",
    "--step-seconds": "the time itself, which is for the user to say",
    "--drain-seconds": "the time itself, which is for the user to say",
    "--max-output-tokens": "no output is longer than the engine's caches",
    "--max-connections": "files that may be open",
    "--max-batched-tokens": "no step has more tokens than run and wait",
}
"""Options that make no work or memory without end, and why."""

EXCEPT = {("convert", "--tokens")}
"""Where an option of that name does."""

OTHERS = {
    ("evaluate", "--answers"): Command("evaluate", ("run", "synthetic:s3")),
    ("analyze", "--queries"): Command("analyze", ("run", "file"), {"--measures": "attention"}),
    ("experiment", "--jobs"): Command("experiment", ("grid.yaml",), {"--out": "grid"}),
}
"""Lines in which an option has an effect, where it has none in those of `COMMANDS`."""


def numbers(command: Command) -> list[str]:
    """The options of a command that are numbers, or lists of them."""
    function = next(one.callback for one in app.registered_commands if one.callback.__name__ == command.name)
    found = []
    for hint in get_type_hints(function, include_extras=True).values():
        kind, *about = get_args(hint) or (hint,)
        kinds = {kind, *get_args(kind), *(inner for one in get_args(kind) for inner in get_args(one))}
        if about and isinstance(about[0], OptionInfo) and kind is not bool:
            name = str(about[0].default)
            if kinds & {int, float} or name in ("--num-loops", "--lengths", "--prefixes", "--contexts", "--batches"):
                found.append(name)
    return found


CASES = {
    (command.name, option): command
    for command in COMMANDS
    for option in numbers(command)
    if option not in ENDS or (command.name, option) in EXCEPT
}


@pytest.mark.parametrize(("name", "option"), CASES)
def test_a_number_without_end_is_refused(name: str, option: str, place: Callable[[int], Path], run: Any) -> None:  # noqa: F811
    place(0)
    error = run(*OTHERS.get((name, option), CASES[name, option]).line(option, HUGE)).error
    assert "20000000" in error.replace(",", "") or "2e+09" in error


def test_no_reason_is_left_over() -> None:
    assert set(ENDS) <= {option for command in COMMANDS for option in numbers(command)}
