"""Errors of recipes in one line, as those of the commands of yoco-u."""

import sys
from collections.abc import Callable

from yoco_u.errors import UserError, describe_system_error


def in_one_line(main: Callable[[], None]) -> None:
    """Run a recipe, and end with status 2 and one line after a mistake or an error of the disk, with 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        _end(f"error: {' '.join(str(error).split())}", 2)
    except OSError as error:
        _end(f"error: {describe_system_error(error)}", 2)
    except KeyboardInterrupt:
        _end("\ninterrupted", 130)


def _end(line: str, status: int) -> None:
    print(line, file=sys.stderr)
    raise SystemExit(status)
