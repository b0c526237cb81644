"""Errors that the user can mend: one clear line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave. The message says what came, what was expected, and what to do.

    The command line prints the message on one line and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its class if it has no message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
