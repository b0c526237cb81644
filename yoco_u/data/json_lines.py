"""Files of JSON lines, read with the place of each line."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from yoco_u.errors import UserError
from yoco_u.files import parse_json
from yoco_u.regular_files import read_regular

T = TypeVar("T", bound=BaseModel)


def read_lines(files: Sequence[Path], shape: type[T], of_what: str) -> Iterator[tuple[str, T]]:
    """The lines of files that are not empty, checked, each with its place: `FILE, line N`.

    Args:
        of_what: what the lines hold, which the error for a file says.

    Raises:
        UserError: at the first file that cannot be read, and the first line that has not this shape; it names both.
    """
    for file in files:
        try:
            lines = read_regular(file).removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise UserError(f"{file}: cannot read it ({error.strerror}); give files of JSON lines with {of_what}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file}, line {number}"
                yield place, parse_json(line, shape, place)
