"""Errors that are the user's to mend: one clear line, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: says what came, what was expected, and what to do.

    The command line prints the message on one line and exits with status 2.
    """
