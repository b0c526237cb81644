"""What commands ask of their arguments: texts, numbers, lists with commas between, and files that will be written."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from yoco_u.config import Config, describe, shown, too_many_loops
from yoco_u.errors import UserError
from yoco_u.files import check_result
from yoco_u.loading import model_folder

_LARGEST = 2**64 - 1

C = TypeVar("C", bound=Config)


def check_texts(arguments: Sequence[str]) -> None:
    """Check that each argument is a text that files and pages can hold, and not an empty one.

    Raises:
        UserError: for bytes that are not UTF-8, for NUL, and for an empty text, which is mostly a variable of the shell that is
            not set: as a path it would mean the current folder.
    """
    before = "an argument"
    for argument in arguments:
        if "\0" in argument or not is_unicode(argument):
            raise UserError(f"the argument {shown(argument)} is not UTF-8 text; write it, or rename the file, in UTF-8")
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            raise UserError(f"{argument.removesuffix('=') or before} is empty; give at least one character, or leave it out")
        before = argument if argument.startswith("-") else "an argument"


def with_checked_numbers(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which refuses numbers that are not finite, and whole ones of more than 64 bits, before it begins.

    Raises:
        UserError: for the first such number.
    """

    @wraps(command)
    def checked(**given: Any) -> None:
        for name, value in given.items():
            for one in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(one, (int, float)) and not abs(one) <= _LARGEST:
                    option = f"--{name.strip('_').replace('_', '-')}"
                    raise UserError(f"{option} is {shown(one)}; expected a number that can be computed with")
        command(**given)

    return checked


def parse_options(cls: type[C], given: dict[str, Any], **spelt: str) -> C:
    """Build `cls` from options.

    Args:
        given: values by the name of the setting; None for an option that was not given.
        spelt: the names of options that are not called as their setting.

    Raises:
        UserError: if something does not fit; it names the option.
    """
    try:
        return cls.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        setting, colon, problem = describe(cls, error).removeprefix(f"{cls.__name__}: ").partition(": ")
        name = setting.partition(".")[0]
        if not colon or name not in cls.model_fields:
            raise UserError(f"options: {setting}{colon}{problem}") from None
        raise UserError(f"--{spelt.get(name, name).replace('_', '-')}: {problem}") from None


def existing_model(path: Path) -> Path:
    """A run folder or a saved model, which is looked for before anything is loaded.

    Raises:
        UserError: if it is neither.
    """
    model_folder(path)
    return path


def existing_models(paths: list[Path]) -> list[Path]:
    """Like `existing_model`, of several."""
    return [existing_model(path) for path in paths]


def standard_input() -> str:
    """All text of the standard input.

    Raises:
        UserError: if it is closed, or not UTF-8 text.
    """
    if sys.stdin is None:
        raise UserError("there is no standard input; give the text itself, or a file with <")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        text = "\udcff"
    if not is_unicode(text):
        raise UserError("the standard input is not UTF-8 text; convert it first")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8. Bytes that could not be read in it have become half pairs (surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def names(text: str | None) -> tuple[str, ...] | None:
    """`a,b` -> (a, b), without repetitions; None for an option that was not given."""
    return None if text is None else tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def whole_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`4096,32768` -> (4096, 32768); None for an option that was not given.

    Raises:
        UserError: if a part is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(part.encode("ascii")) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}; expected whole numbers with commas between, such as 4096,32768") from None


def check_unused(why: str, **options: object) -> None:
    """Refuse options that would have no effect.

    Args:
        why: the other options beside which they have none, such as `--greedy takes the likeliest token`.
        options: values by the name of the option, with _ for -; None, False or an empty list where it was not given.

    Raises:
        UserError: for the first option that was given.
    """
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise UserError(f"--{name.replace('_', '-')} has no effect here: {why}; leave it out")


def check_at_most(limit: int, why: str, **options: int | None) -> None:
    """Refuse numbers that ask for more work or memory than makes sense.

    Args:
        why: the reason for the limit.
        options: values by the name of the option, with _ for -; None where it was not given.

    Raises:
        UserError: for the first number above the limit.
    """
    for name, value in options.items():
        if value is not None and value > limit:
            raise UserError(f"--{name.replace('_', '-')} is {shown(value)}; expected at most {limit:,} ({why})")


MOST_ROW_TOKENS = 2**20


def check_row_length(sequence_length: int | None) -> None:
    """Refuse rows that no forward pass holds.

    Raises:
        UserError: if there are too many tokens in a row.
    """
    check_at_most(MOST_ROW_TOKENS, "a row is computed in one pass", sequence_length=sequence_length)


def check_loops(counts: Sequence[int | None]) -> None:
    """Check values of `--num-loops`, before the first of them is run.

    Raises:
        UserError: for a loop count that no model can run, and one that comes twice.
    """
    for loops in counts:
        if loops is not None and loops < 1:
            raise UserError(f"--num-loops is {shown(loops)}; expected a whole number of at least 1")
        if loops is not None and (problem := too_many_loops(loops)):
            raise UserError(f"--num-loops: {problem}")
    if len(set(counts)) < len(counts):
        raise UserError(f"--num-loops is {', '.join(map(str, counts))}; expected each value once")


def loops_or_auto(text: str | None, option: str = "--num-loops") -> int | str | None:
    """`3` -> 3, `auto` -> auto; None for an option that was not given.

    Raises:
        UserError: if it is neither a whole number from 1 to 256 nor auto.
    """
    if text is None or text == "auto":
        return text
    if not text.isascii() or not text.isdecimal() or len(text) > 4000 or int(text) < 1:
        raise UserError(f"{option} is {shown(text)}; expected a whole number of at least 1, or auto")
    if problem := too_many_loops(int(text)):
        raise UserError(f"{option}: {problem}")
    return int(text)


def check_can_be_written(**files: Path | None) -> None:
    """Check the files that options name, before the work whose results go there is begun.

    Args:
        files: paths by the name of their option, such as `json=path`; None where it was not given.

    Raises:
        UserError: if the folder of a file does not exist, two options name the same file, or something is there that is no
            result of an earlier command.
        OSError: if the folder cannot be written to.
    """
    taken: dict[str, str] = {}
    for option, file in files.items():
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"--{option} {file}: no such folder {file.parent}; make it first")
        if file is not None:
            check_result(file)
            same = taken.setdefault(os.path.realpath(file), option)
            if same != option:
                raise UserError(f"--{option} {file}: is the file of --{same} too; name another file")
