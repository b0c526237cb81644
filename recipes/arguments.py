"""The command lines of recipes."""

import argparse
from typing import NoReturn

from yoco_u.errors import UserError


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the description as it is. A mistake on the command line is a `UserError`."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)
