"""Small files that appear whole or not at all, even if the power fails, and results that replace nothing but our own.

What is not complete lies in a folder beside its place, see `yoco_u.folders`. Files that users name say who made them, see
`is_result`. What does not say so belongs to somebody else, and stays.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from yoco_u.errors import UserError, naming
from yoco_u.folders import NewFolder, check_place, sync
from yoco_u.regular_files import read_regular
from yoco_u.version import __version__

T = TypeVar("T")

DAMAGED = "the file is damaged; restore it from a copy, or make it anew"
"""What the error about a file says that does not hold what was once written there."""

GENERATOR = f"yoco-u {__version__}"
"""How the files that users name say who made them."""

_RESULT = re.compile(
    rb'\A\{\s*"generator": "yoco-u |\AWritten by yoco-u '  # JSON, see `write_result`; text
    rb'|\A\{\s*"environment": \{\s*"started": "[^"]*",\s*"yoco_u": "'  # JSON of earlier versions, as that of the next two
    rb'|\A\{\s*"title": "(?:[^"\\]|\\.)*",\s*"version": "[^"]*",\s*"experiment": \{\s*"title": '
    rb'|\A\{\s*"about": \{\s*"text": "(?:[^"\\]|\\.)*",\s*"tokens": \d+,\s*"sequence_length": '
    rb"|\A\x89PNG.{0,999}Software\0yoco-u "  # `yoco_u.plotting.save_png`
    rb"|\AGGUF.{0,999}yoco_u\.generator.{12}yoco-u "  # `yoco_u.conversion.gguf_writer.write_gguf`
    rb'|\A\s*<!doctype html>.*<footer class="quiet">Written [^<]* by yoco-u [^<]*</footer>\s*</body>\s*</html>\s*\Z',
    re.DOTALL,
)
_MOST = 2048  # bytes of the beginning and of the end of a file that tell who made it


class DamagedFile(UserError):  # noqa: N818
    """A file is missing, or does not hold what was written to it."""


Say = Callable[[str], object]
"""What to do with a line for the user."""


def is_result(path: Path) -> bool:
    """Whether a file is JSON, a picture, a page or a GGUF file that says that this package made it."""
    with path.open("rb") as file:
        head, size = file.read(_MOST), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST))
        return bool(_RESULT.search(head + file.read()))


def check_result(path: Path) -> None:
    """Check, before anything is computed, that a result may be written to a file that a user names.

    It may be new, or the result of an earlier command, see `is_result`.

    Raises:
        UserError: if something else is there.
        OSError: if its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    real = Path(os.path.realpath(path))
    if path.exists() or os.path.lexists(real):
        if not path.is_file():
            raise UserError(f"{path}: is no regular file; name another file")
        if not is_result(path):
            raise UserError(f"{path}: is there and was not made by yoco-u; name another file, or move it elsewhere")
    check_place(real)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, which becomes `path` in one moment when the block ends without an error.

    A link is followed. An error of the file system names `path`, whatever library it comes from.
    """
    path = Path(os.path.realpath(path))
    with naming(path), closing(NewFolder(path)) as new:
        file = new.folder / path.name
        yield file
        sync(file)
        file.replace(path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, which appears whole or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, which appears whole or not at all."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_result(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that says who made it, unless something else is there; errors as of `check_result`."""
    check_result(path)
    write_json(path, {"generator": GENERATOR} | data)


def read_json(path: Path, shape: type[T], default: T | None = None, say: Say | None = None) -> T:
    """Read a JSON file. Every small file of a run, a dataset or a model is read by this function.

    Args:
        shape: what the file holds, as a type that pydantic checks: `dict[str, Any]`, `list[float]` or a model.
        default: what to return if there is no file.
        say: given by whoever makes the file anew where it is missing: so counts a damaged one then, which is said.

    Raises:
        UserError: if it cannot be read, or is a pipe or a device; it names the file.
        DamagedFile: if it is not JSON, or holds anything but `shape`; it names the file and the place.
    """
    if default is not None and not os.path.lexists(path):
        return default
    try:
        return parse_json(read_regular(path), shape, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except DamagedFile as error:
        if default is None or say is None:
            raise
        say(f"{str(error).removesuffix(DAMAGED)}it is made anew")
        return default


def parse_json(text: bytes, shape: type[T], source: str) -> T:
    """The value of a JSON text in UTF-8, as in `read_json`; `source` is where it came from, which the error names.

    Infinity and NaN, which JSON does not have, are errors too, and so are numbers that would become infinite.
    """
    if not text.strip(b"\0 \n"):
        raise DamagedFile(f"{source}: empty; {DAMAGED}")
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise DamagedFile(f"{source}: not JSON ({error}); {DAMAGED}") from None
    if (place := _infinite(found)) is not None:
        raise DamagedFile(f"{source}: {_words(place)}: the number is larger than any float; {DAMAGED}")
    return checked(found, shape, source)


def checked(data: Any, shape: type[T], source: str) -> T:
    """What a JSON text holds, as a type that pydantic checks; arguments and errors as of `parse_json`."""
    try:
        adapter: TypeAdapter[T] = _adapter(cast("Any", shape))
        return adapter.validate_python(data)
    except ValidationError as error:
        problem = error.errors()[0]
        raise DamagedFile(f"{source}: {_words(problem['loc'])}: {problem['msg']}; {DAMAGED}") from None


def _words(place: Iterable[Any]) -> str:
    return ".".join(map(str, place)) or "the whole"


def _infinite(data: Any) -> tuple[Any, ...] | None:
    """Where a number is that JSON has and a float has not, such as 1e999; None if there is none."""
    if isinstance(data, float):
        return None if math.isfinite(data) else ()
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(data, dict):
        parts = data.items()
    elif isinstance(data, list):
        parts = enumerate(data)
    for key, one in parts:
        if (place := _infinite(one)) is not None:
            return (key, *place)
    return None


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
