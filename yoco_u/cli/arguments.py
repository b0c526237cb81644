"""Values of options: lists with commas between, and files that will be written."""

from pathlib import Path

from yoco_u.errors import UserError


def names(text: str | None) -> tuple[str, ...] | None:
    """`a,b` -> (a, b), each once."""
    return None if text is None else tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def whole_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`4096,32768` -> (4096, 32768)

    Raises:
        UserError: if there is something else in it.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}; expected whole numbers with commas between, such as 4096,32768") from None


def check_can_be_written(**files: Path | None) -> None:
    """Files of options such as `json=path`, before the work whose results go there.

    Raises:
        UserError: if one has no folder to lie in, or is a folder.
    """
    for option, file in files.items():
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"--{option} {file}: no such folder {file.parent}; make it first")
        if file is not None and file.is_dir():
            raise UserError(f"--{option} {file}: is a folder; name a file")
