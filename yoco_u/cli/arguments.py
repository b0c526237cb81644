"""What several commands ask of their options: lists with commas between, and checks of files that will be written."""

import os
from pathlib import Path

from yoco_u.errors import UserError
from yoco_u.files import check_result


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
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}; expected whole numbers with commas between, such as 4096,32768") from None


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
