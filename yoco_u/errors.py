"""Errors that the user can mend: one clear line instead of a traceback."""

import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from argparse import ArgumentParser


class UserError(ValueError):
    """A mistake in what the user gave. The message says what came, what was expected, and what to do.

    The command line prints the message on one line and exits with status 2.

    Args:
        setting: dotted name of the setting or parameter that is wrong, where it is a single one.
    """

    def __init__(self, message: str = "", setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one behind a colon, or its class's name without a message."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {more[0]}" if first.endswith(":") and more else first


def class_and_line(error: BaseException) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def said_of(error: BaseException) -> str:
    """What to say of an exception that one request has caused, so that the request ends and others go on.

    Panics of libraries written in Rust count as well, which are no `Exception`.

    Raises:
        KeyboardInterrupt, SystemExit, GeneratorExit: if the exception is one of these, which ask for the end of more than that.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
    return class_and_line(error)


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that is behind an exception; None if there is none.

    Libraries wrap such errors, or put them into words of their own: safetensors' "No space left on device (os error 28)", the
    failures of torch's checkpoints, torch.save's "PytorchStreamWriter failed writing file".
    """
    chain: list[BaseException | None] = [error]
    for one in chain:
        if one is None:
            continue
        if isinstance(one, OSError) and one.errno is not None:
            return one
        said = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(one))
        if said is not None:
            number = int(said[1] or said[2])
            return OSError(number, os.strerror(number))
        if re.search(r"PytorchStreamWriter failed|unexpected pos \d+ vs|\d+ requested and \d+ written", str(one)):
            return OSError(errno.EIO, "Writing failed, perhaps for want of space")
        wrapped = getattr(one, "failures", None)  # of torch's CheckpointException, by rank
        chain += [one.__cause__, *(failure for failure, _ in (wrapped or {}).values())]
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what libraries raise when the disk is full, or cannot be written to, into an OSError that names a file: `path`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        found = system_error(error)
        if found is None or (found is error and error.filename is not None):
            raise
        raise OSError(found.errno, found.strerror, found.filename or str(path)) from error


def describe_system_error(error: OSError) -> str:
    """An error of the operating system in one line: the path, what happened, and what to do."""
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror}; {_ADVICE.get(error.errno or 0, 'mend this')}, then run the same command again"


def import_optional(module: str, need: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        need: what needs which package, which begins the error.
        extra: the extra of ours that installs it.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{need}: pip install 'yoco-u[{extra}]'") from None


def script_parser(description: str | None) -> "ArgumentParser":
    """A parser for scripts, which shows their description as it is. A mistake on the command line is a `UserError`."""
    import argparse  # which the commands do not need

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def in_one_line(main: Callable[[], object]) -> None:
    """Run a script, and end with status 2 and one line after a mistake or an error of the disk, with 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except OSError as error:
        _end(f"error: {describe_system_error(error)}", 2)
    except KeyboardInterrupt:
        _end("\ninterrupted", 130)


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(status)


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EROFS: "name another place, or make this one writable",
    errno.EACCES: "name another place, or change the permissions",
    errno.EPERM: "name another place, or change the permissions",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "look after the disk",
} | dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "check the path")
